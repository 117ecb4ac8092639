"""The estimator with everything on a GPU, against the same on the CPU; see tests/pretend_gpu.py.

`tests/test_triton.py` runs this file in a process of its own: what it changes in torch stays there.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from pretend_gpu import CHECKED, DEVICE, PretendGpu, once, pretended_gpu, to_device
from support import CONFIGS, RECURRENT, make_model, make_rows, make_text_rows, make_tokenizer, warm_optimizer

from montessori import InfluenceEstimator, calibration, cuda, gpu, ops, tiles, trial
from montessori.errors import ArgumentError, FallbackWarning, ModelError
from montessori.loop.engines import EngineSettings, Request, Sampling, open_engine
from montessori.losses import response_loss
from montessori.models import load_model
from montessori.norms import _places_on
from montessori.spans import owners_on, spans_on

ROWS, REFERENCES = make_rows(5, seed=1), make_rows(3, seed=2)
# Float32 sums of the same terms, in another order: some hundred roundings of the largest score. An anchor, and a real
# step, subtract two losses of whose roundings no influence is free.
ROUNDINGS = 100 * torch.finfo(torch.float32).eps
# Of other kinds the second layer does what the first one does; tied and untied models have two in all other tests.
LAYERS_DIFFER = {"gemma2", "gpt_oss", "deepseek_v3", "qwen3_5"}


def assert_equal_scores(name: str, reference=REFERENCES, rows=ROWS, layers=None, **options) -> None:
    """Scores by the kernels for a GPU are those of plain torch on the CPU."""
    settings = {"pilot": 1, "method": "first_order"} | options
    model = make_model(name, torch.float32, layers=layers)
    want = InfluenceEstimator(model, warm_optimizer(model), reference, backend="reference", **settings).score(rows)
    model = make_model(name, torch.float32, layers=layers)
    optimizer = warm_optimizer(model)
    with pretended_gpu():
        to_device(model, optimizer)
        got = InfluenceEstimator(model, optimizer, reference, **settings).score(rows)
        assert all(parameter.device == DEVICE for parameter in model.parameters())
    losses = 0.0 if settings["method"] == "first_order" else abs(want.loss).max()
    assert abs(got.influence - want.influence).max() <= ROUNDINGS * (abs(want.influence).max() + losses)
    assert abs(got.loss - want.loss).max() <= ROUNDINGS * want.loss.max()


@pytest.mark.parametrize("name", [*CONFIGS, *RECURRENT, "llama_lora"])
def test_every_kind_of_model_is_scored(name):
    assert_equal_scores(name, layers=2 if name in LAYERS_DIFFER else 1)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "anchored"},
        {"method": "exact"},
        {"max_grad_norm": 0.5},
        {"reference_dtype": "model"},
        {"reference_weighting": "token_mean"},
        {"reference": {"one": REFERENCES[:1], "two": REFERENCES}},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama_tied", "llama_untied"])
def test_every_setting_is_scored(name, options):
    assert_equal_scores(name, **options)


@pytest.mark.parametrize("method", ["anchored", "exact"])
def test_a_loss_of_ones_own_is_scored(method):
    def weighted(model, batch):
        return torch.tensor([row["worth"] for row in batch.rows], device=batch.labels.device) * response_loss(
            model, batch
        )

    rows = [{**row, "worth": 0.5 + number} for number, row in enumerate(ROWS)]
    assert_equal_scores("llama_tied", rows=rows, method=method, loss_fn=weighted)


@pytest.mark.parametrize("clipping", [{}, {"max_grad_norm": 0.5}])
@pytest.mark.parametrize("name", ["llama_tied", "llama_biases"])
def test_the_host_waits_neither_for_every_layer_nor_for_every_example(name, clipping):
    waits = []
    for layers, size in ((1, 3), (2, 4)):
        torch.manual_seed(0)
        config = CONFIGS[name]()
        config.num_hidden_layers = layers
        model = transformers.AutoModelForCausalLM.from_config(config)
        optimizer = warm_optimizer(model)
        with pretended_gpu() as gpu:
            to_device(model, optimizer)
            estimator = InfluenceEstimator(model, optimizer, REFERENCES, pilot=1, **clipping)
            estimator.prepare(ROWS[:size])
            gpu.waits.clear()
            for once_for_a_batch in (spans_on, owners_on, _places_on):
                once_for_a_batch.cache_clear()
            estimator.score(ROWS[:size])
        waits.append(gpu.waits)
    assert waits[0] == waits[1]


def test_a_checkpoint_is_scored_and_audited(student):
    rows, references = make_text_rows(5, seed=1), make_text_rows(3, seed=2)
    model, tokenizer = load_model(student)
    want = InfluenceEstimator(model, student, references, tokenizer=tokenizer).score(rows)
    with pretended_gpu():
        to_device(model)
        estimator = InfluenceEstimator(model, student, references, tokenizer=tokenizer)
        got, audit = estimator.score(rows), estimator.audit(rows, k=4)
    np.testing.assert_allclose(got.influence, want.influence, rtol=0, atol=ROUNDINGS * abs(want.loss).max())
    assert audit.agreement["reference"].pearson > 0.99


def test_a_gpu_that_the_kernels_do_not_run_on_is_scored_by_plain_torch(monkeypatch):
    launched = []
    monkeypatch.setattr(PretendGpu, "launch", lambda self, kernel, name: lambda *given, **named: launched.append(name))
    monkeypatch.setattr(tiles, "capability", lambda device: (7, 5))
    assert_equal_scores("llama_tied")
    assert launched == []
    with pretended_gpu():
        p = trial.make_problem((24, 40), (5, 3))
        with pytest.raises(
            ArgumentError, match=r"impl='triton': .*capability 8.0 and later, cuda:0 has 7.5; pass impl"
        ):
            ops.linear_influence(p.x, p.dy, p.offsets, *p.state, trial.STEP, impl="triton")
        monkeypatch.setattr(cuda, "KERNELS", {})
        with pytest.raises(ArgumentError, match=r"calibrate: expected a device .*cuda:0 has 7.5; CUDA: .*reference"):
            calibration.calibrate()


@pytest.mark.skipif(cuda.load_error() is not None, reason=f"{cuda.load_error()}")
@pytest.mark.parametrize("name", ["llama_tied", "llama_untied"])
def test_the_compiled_kernels_are_given_what_they_take(name):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.vocab_size = 64
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    optimizer, scores = warm_optimizer(model), {}
    with pretended_gpu():
        to_device(model, optimizer)
        for backend in ("cuda", "reference"):
            settings = {"method": "first_order", "reference_dtype": "model", "backend": backend}
            scores[backend] = InfluenceEstimator(model, optimizer, REFERENCES, **settings).score(ROWS).influence
    # The same bfloat16 factors; sums in float64 and float32.
    assert abs(scores["cuda"] - scores["reference"]).max() <= ROUNDINGS * abs(scores["reference"]).max()


def test_a_teacher_writes_the_same_texts(tmp_path):
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    # Weights so large that no two words are as likely but for a rounding.
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = [Request(str(seed), prompt, seed) for seed, prompt in enumerate(["what is the capital", "say hello"] * 2)]
    sampling = Sampling(max_new_tokens=8, presence_penalty=0.5, repetition_penalty=1.1)

    engine = open_engine(EngineSettings(device="cpu"))
    engine.load(tmp_path)
    want = engine.generate(asked, sampling)
    with pretended_gpu():
        to_device(engine._model)
        assert engine.generate(asked, sampling) == want


IN_A_PROCESS = calibration._in_a_process


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """What `calibrate` finds with little problems, and times that are given by kernel and state."""
    times = {"wgmma_cluster": {"float32": 3.0, "bfloat16": 1.0}, "wgmma": {"float32": 2.0, "bfloat16": 2.0}}
    monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "SHAPES", ((24, 40),))
    monkeypatch.setattr(calibration, "LENGTHS", (8, 16))
    monkeypatch.setattr(calibration, "PACKED_TOKENS", 32)
    for constant, value in {**CHECKED, "NARROW": (torch.bfloat16,)}.items():
        monkeypatch.setattr(trial, constant, value)
    monkeypatch.setattr(trial, "milliseconds", once)

    def in_this_process(name):
        outcome = json.loads(json.dumps(calibration.measure(name)))
        for row in outcome["rows"]:
            row["ratio"] = times.get(name, {}).get(row["state"], 4.0)
        return outcome

    monkeypatch.setattr(calibration, "_in_a_process", in_this_process)
    for cached in (calibration._kept, calibration._ensure):
        cached.cache_clear()
    yield lambda: calibration.calibrate()
    for cached in (calibration._kept, calibration._ensure):
        cached.cache_clear()


def kernel_taken(monkeypatch, impl, state, tied=False):
    """Name of the CUDA kernel that scores a little problem, "triton" for Triton."""
    taken = []
    monkeypatch.setattr(cuda, "linear_influence", lambda *arguments, kernel=None: taken.append(kernel or "default"))
    for name in ("triton", "reference"):
        monkeypatch.setitem(ops._LINEAR, name, lambda *arguments, name=name: taken.append(name))
    p = trial.make_problem((24, 40), (5, 3), state=state, tied=tied)
    ops.linear_influence(p.x, p.dy, p.offsets, *p.state, trial.STEP, rows=p.rows, impl=impl)
    monkeypatch.undo()
    return taken[0]


@pytest.mark.skipif(cuda.load_error() is not None, reason=f"{cuda.load_error()}")
def test_auto_takes_what_was_measured_to_be_fastest(measured, tmp_path):
    def taken(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            return kernel_taken(patch, *arguments)

    wide, narrow = torch.float32, torch.bfloat16
    with pretended_gpu():
        with pytest.warns(FallbackWarning, match="montessori calibrate"):
            assert [taken("auto", wide), taken("cuda", wide)] == ["triton", "default"]
        assert measured()["ranking"]["float32"] == ["wgmma", "wgmma_cluster", "mma", "triton"]
        assert [taken(impl, wide) for impl in ("auto", "cuda", "triton")] == ["wgmma", "wgmma", "triton"]
        assert [taken(impl, narrow) for impl in ("auto", "cuda")] == ["wgmma_cluster", "wgmma_cluster"]
        # What the CUDA kernels do not take.
        assert taken("auto", wide, True) == "triton"
        # A file that is damaged is none of float32's business.
        x = torch.zeros(8, 8, device=DEVICE)
        kept, text = tmp_path / "kernels.json", (tmp_path / "kernels.json").read_text()
        kept.write_text("{")
        calibration._kept.cache_clear()
        assert calibration.resolve("auto", trial.STEP, x, x, x[None], x, x, x) == "auto"
        kept.write_text(text)
        # Of other versions.
        kept.write_text(text.replace(torch.__version__, "1.0"))
        calibration._kept.cache_clear()
        with pytest.warns(FallbackWarning):
            assert taken("auto", wide) == "triton"


@pytest.mark.skipif(cuda.load_error() is not None, reason=f"{cuda.load_error()}")
def test_the_first_estimator_on_a_gpu_measures_for_all(measured, tmp_path, monkeypatch, caplog):
    def estimated(dtype, **options):
        model = make_model("llama_tied", dtype)
        optimizer = warm_optimizer(model)
        to_device(model, optimizer)
        return InfluenceEstimator(model, optimizer, REFERENCES, **options)

    kept = tmp_path / "kernels.json"
    with pretended_gpu():
        estimated(torch.bfloat16)
        assert not kept.exists()
        monkeypatch.delenv("MONTESSORI_CALIBRATE")
        # Nothing to choose: float32 has Triton alone, a name leaves no choice, real steps have no such kernel.
        estimated(torch.float32)
        estimated(torch.bfloat16, backend="triton")
        estimated(torch.bfloat16, method="exact")
        assert not kept.exists()
        assert calibration.fastest(DEVICE) == []
        estimated(torch.bfloat16)
        assert calibration.fastest(DEVICE) == ["bfloat16: wgmma_cluster", "float32: wgmma"]
        assert [record.message.split(":")[0] for record in caplog.records] == ["a pretended GPU"]
        kept.unlink()
        estimated(torch.bfloat16)
        assert not kept.exists()


@pytest.mark.skipif(cuda.load_error() is not None, reason=f"{cuda.load_error()}")
def test_where_measuring_fails_triton_scores_and_the_reason_is_told(measured, tmp_path, monkeypatch):
    monkeypatch.delenv("MONTESSORI_CALIBRATE")
    model = make_model("llama_tied", torch.bfloat16)
    optimizer = warm_optimizer(model)
    kept, asked = tmp_path / "kernels.json", []

    def fails(name):
        asked.append(name)
        return {"error": f"no code for {name}"}

    def ensured(reason):
        calibration._ensure.cache_clear()
        calibration._kept.cache_clear()
        if not reason:
            calibration.ensure(parameters)
            return
        with pytest.warns(FallbackWarning, match=reason):
            calibration.ensure(parameters)

    with pretended_gpu():
        to_device(model, optimizer)
        parameters = list(model.parameters())
        works = calibration._in_a_process
        # The process that would measure finds no device here. That passes: nothing is kept.
        monkeypatch.setattr(calibration, "_in_a_process", IN_A_PROCESS)
        ensured("takes Triton .*wgmma_cluster could not be tried .*nothing is kept; mend that and run montessori calib")
        assert not kept.exists()
        # What is wrong with the kernels is not tried again.
        monkeypatch.setattr(calibration, "_in_a_process", fails)
        ensured("takes Triton .*no kernel gave right results .*mma: no code for mma; triton: no code for triton")
        ensured(None)
        assert asked == ["wgmma_cluster", "wgmma", "mma", "triton"]
        # A damaged file is written anew.
        monkeypatch.setattr(calibration, "_in_a_process", works)
        for damaged in ('{"x": ', "[]", '{"a pretended GPU": 1}'):
            kept.write_text(damaged)
            ensured("written anew")
            assert json.loads(kept.read_text())["a pretended GPU"]["ranking"]
        kept.unlink()
        (tmp_path / "kernels.lock").unlink()
        (tmp_path / "kernels.lock").mkdir()
        ensured("takes Triton .*kernels.lock: cannot be locked")


@pytest.mark.skipif(cuda.load_error() is not None, reason=f"{cuda.load_error()}")
def test_a_kernel_that_was_wrong_is_not_taken(measured, monkeypatch):
    works = calibration._in_a_process

    def fails(names):
        outcome = {"error": "wrong results: {}"}
        monkeypatch.setattr(calibration, "_in_a_process", lambda name: outcome if name in names else works(name))

    def taken(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            return kernel_taken(patch, *arguments)

    wide = torch.float32
    with pretended_gpu():
        fails(("triton", "wgmma"))
        measured()
        assert taken("auto", wide) == "wgmma_cluster"
        with pytest.warns(FallbackWarning, match="plain torch, since Triton's kernel failed .*wrong results"):
            assert taken("auto", wide, True) == "reference"
        fails(calibration.kernels())
        with pytest.raises(ModelError, match="no kernel gave right results"):
            measured()
        with pytest.warns(FallbackWarning, match="takes plain torch"):
            assert taken("auto", wide) == "reference"


@pytest.mark.parametrize("breaks", ["RuntimeError: cudaErrorIllegalAddress", None])
def test_what_the_kernel_breaks_is_its_own_and_a_lack_of_memory_is_not(breaks, measured, monkeypatch):
    def run(*arguments):
        raise RuntimeError(breaks.split(": ")[1]) if breaks else torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "linear_influence", run)
    with pretended_gpu():
        if breaks:
            assert calibration.measure("triton") == {"error": breaks}
        else:
            with pytest.raises(torch.OutOfMemoryError):
                calibration.measure("triton")
