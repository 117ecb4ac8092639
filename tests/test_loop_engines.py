"""Engines: penalties, nucleus, stop strings, seeds and batches."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from engine_support import PROMPTS, opened, requests, write_all
from support import make_tokenizer

from montessori.errors import DataError, ModelError
from montessori.loop import cache
from montessori.loop.decoding import _Chooser, _draw, cut_at_stop
from montessori.loop.engines import EngineSettings, Request, Sampling, open_engine


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny llama whose vocabulary is the tokenizer's; random weights, so any word follows any other."""
    path = tmp_path_factory.mktemp("teacher")
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_texts_do_not_depend_on_what_shares_the_batch(teacher):
    sampling = Sampling(max_new_tokens=12, repetition_penalty=1.2)
    asked = requests(PROMPTS, siblings=3)
    together = write_all(opened(teacher, batch_size=16), asked, sampling)
    assert together == write_all(opened(teacher, batch_size=5), asked, sampling)
    assert together == write_all(opened(teacher, batch_size=1), asked, sampling)
    assert len({sample.text for sample in together}) > 8
    assert together != write_all(opened(teacher), requests(PROMPTS, siblings=3, seed=1), sampling)


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_text_is_that_of_transformers(teacher, penalty, monkeypatch):
    # Keys and values outgrow their room several times.
    monkeypatch.setattr(cache, "_ROOM", 4)
    engine = opened(teacher)
    sampling = Sampling(temperature=0, presence_penalty=0, repetition_penalty=penalty, max_new_tokens=15)
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    for prompt, sample in zip(PROMPTS, write_all(engine, requests(PROMPTS), sampling), strict=True):
        ids = engine.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, do_sample=False, max_new_tokens=15, repetition_penalty=penalty, pad_token_id=0)
        expected = whole[0, ids.shape[1] :]
        assert sample.text == engine.tokenizer.decode(expected, skip_special_tokens=True)
        assert sample.ids == expected.tolist() and sample.num_tokens == len(expected)


def test_ids_hold_the_token_that_ended_the_text(teacher):
    engine = opened(teacher)
    asked, sampling = requests(PROMPTS, siblings=4), Sampling(max_new_tokens=10)
    longest = max(write_all(engine, asked, sampling), key=lambda sample: sample.num_tokens)
    # The generation config names a second token that ends a text, as those of many instruct models do.
    end = longest.ids[len(longest.ids) // 2]
    assert end != engine.tokenizer.eos_token_id
    engine._model.generation_config.eos_token_id = [engine.tokenizer.eos_token_id, end]
    samples = write_all(engine, asked, sampling)
    ends = [sample.ids[-1] for sample in samples if sample.finish == "stop"]
    assert end in ends and set(ends) <= {engine.tokenizer.eos_token_id, end}
    assert all(sample.num_tokens == len(sample.ids) == 10 for sample in samples if sample.finish == "length")


ARCHITECTURES = {
    "gpt2": lambda size: transformers.GPT2Config(vocab_size=size, n_embd=16, n_head=4, n_layer=2, n_positions=64),
    "gemma2": lambda size: transformers.Gemma2Config(
        vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8, max_position_embeddings=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_learned_positions_and_sliding_windows_survive_padding(name, tmp_path):
    tokenizer = make_tokenizer()
    torch.manual_seed(2)
    config = ARCHITECTURES[name](len(tokenizer))
    config.eos_token_id, config.bos_token_id, config.pad_token_id = 1, None, 1
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = requests([*PROMPTS, "say hello world and name the capital of france two and three and add five"])
    sampling = Sampling(max_new_tokens=20, presence_penalty=0)
    together = write_all(opened(tmp_path, batch_size=8), asked, sampling)
    assert together == write_all(opened(tmp_path, batch_size=1), asked, sampling)


def test_the_cache_goes_by_the_word_that_the_installed_transformers_has_for_it(teacher):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        written = write_all(opened(teacher), requests(PROMPTS), Sampling(max_new_tokens=5))
    assert all(sample.num_tokens for sample in written)


def test_presence_penalty_falls_on_what_was_written_alone():
    sampling = Sampling(temperature=0, presence_penalty=1.5)
    chooser = _Chooser(sampling, [[0], [1]], 3, torch.device("cpu"))
    logits, unused = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]), torch.zeros(2)
    # The first token is in the first prompt, and still the likeliest until it was written.
    assert [chooser.choose(logits, unused).tolist() for _ in range(3)] == [[0, 0], [1, 1], [0, 0]]


def test_nucleus_holds_the_shortest_beginning_that_reaches_top_p():
    probabilities = torch.tensor([0.5, 0.05, 0.3, 0.15])
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    logits = probabilities.log().expand(4000, 4)
    for top_p, share in (
        (1.0, [0.5, 0.05, 0.3, 0.15]),
        (0.8, [0.625, 0, 0.375, 0]),
        (0.81, [0.5263, 0, 0.3158, 0.1579]),
    ):
        found = torch.bincount(_draw(logits, top_p, uniforms), minlength=4) / 4000
        # The draw is the inverse distribution function, so the only error is the grid's: a step per edge.
        assert torch.allclose(found, torch.tensor(share), atol=1e-3)


def test_a_wide_nucleus_takes_the_whole_vocabulary():
    uniforms = torch.tensor([0.0, 0.5, 0.999999], dtype=torch.float64)
    tokens = _draw(torch.linspace(1e-3, 0, 5000).expand(3, 5000), 0.99, uniforms)
    assert tokens.tolist()[0] == 0
    assert tokens[1] == pytest.approx(2475, abs=3)
    assert tokens[2] == pytest.approx(4950, abs=3)


def test_texts_end_at_the_stop_string_and_at_the_limit(teacher):
    engine = opened(teacher)
    asked = requests(PROMPTS, siblings=4)
    free = write_all(engine, asked, Sampling(max_new_tokens=10))
    stopped = write_all(engine, asked, Sampling(max_new_tokens=10), stop=("the",))
    assert any("the" in sample.text for sample in free)
    for before, after in zip(free, stopped, strict=True):
        assert after.text == cut_at_stop(before.text, ("the",))
        assert after.finish == ("stop" if "the" in before.text else before.finish)
        assert after.num_tokens <= before.num_tokens <= 10
    assert {sample.finish for sample in free} == {"stop", "length"}


def test_output_is_bounded_by_the_context_and_a_longer_prompt_is_refused(teacher):
    engine = opened(teacher)
    sample = engine.generate([Request("a", " ".join(["say"] * 60), 0)], Sampling(temperature=0, presence_penalty=0))[0]
    assert sample.num_tokens <= 4
    with pytest.raises(DataError, match=r"prompt b: expected 1 to 63 tokens, got 64"):
        engine.batches([Request("a", "say", 0), Request("b", " ".join(["say"] * 64), 0)])
    with pytest.raises(DataError, match="expected 1 to 9 tokens, got 12"):
        opened(teacher, max_length=10).batches([Request("b", " ".join(["say"] * 12), 0)])


def test_a_released_engine_can_be_loaded_again(teacher):
    engine = opened(teacher)
    before = engine.generate(requests(["say"]), Sampling(max_new_tokens=5))
    engine.release()
    engine.load(teacher)
    assert engine.generate(requests(["say"]), Sampling(max_new_tokens=5)) == before


def test_an_engine_that_is_not_installed_names_its_package():
    from importlib.util import find_spec

    if find_spec("vllm") is not None:
        pytest.skip("vllm is installed")
    with pytest.raises(ModelError, match=r"pip install vllm"):
        open_engine(EngineSettings(name="vllm"))
