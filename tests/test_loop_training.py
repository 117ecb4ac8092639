from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from loop_support import KilledError, distance, kill_after, make_generated, make_signal, metrics, weights
from peft import LoraConfig, get_peft_model
from support import make_text_rows

from montessori.encoding import encode_continuations
from montessori.errors import DataError, ModelError
from montessori.loop import fit, pairs, tune
from montessori.loop.tune import LoraSettings, TuneSettings
from montessori.models import load_model
from montessori.writing import write_jsonl

TUNE = {"learning_rate": 1e-3, "batch_size": 2, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs")
    rows = make_generated(6)
    values = [(-1) ** row["sibling"] * (1 + row["sibling"]) for row in rows]
    pairs.run(pairs.PairSettings(), rows, make_signal(values), out)
    return out / pairs.PAIRS_FILE


@pytest.fixture(scope="module")
def tuned(student, pairs_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("tune")
    summary = tune.run(TuneSettings(**TUNE), student, pairs_file, out, seed=0, progress=False)
    return out, summary


def margin(directory, reference, row) -> float:
    """log-ratio of the chosen text minus that of the rejected one, by plain forward passes."""

    @torch.no_grad()
    def log_prob(source, completion):
        model, tokenizer = load_model(source)
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        ids = prompt + tokenizer(completion, add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        picked = logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        return float(picked[len(prompt) - 1 :].sum())

    return sum(
        sign * (log_prob(directory, row[side]) - log_prob(reference, row[side]))
        for sign, side in ((1, "chosen"), (-1, "rejected"))
    )


def test_dpo_moves_the_teacher_from_rejected_to_chosen(tuned, student, pairs_file):
    out, summary = tuned
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    held_out = set(json.loads((out / "summary.json").read_text())["validation_prompts"])
    trained = [row for row in rows if row["prompt_id"] not in held_out]
    assert summary["num_pairs"] == len(trained) and summary["num_validation_pairs"] == len(rows) - len(trained) > 0
    gained = [margin(out / tune.TEACHER, student, row) for row in trained]
    assert sum(gained) / len(gained) > 0.05
    # The first step compares the teacher with itself: the precomputed log-probabilities are its own.
    assert metrics(out)[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert "eval_rewards/accuracies" in metrics(out)[-1]
    assert not (out / fit.CHECKPOINTS).exists()


@pytest.mark.parametrize("shown", [True, False])
def test_bars_are_shown_where_progress_is(shown, student, pairs_file, tmp_path, capfd):
    tune.run(TuneSettings(**TUNE), student, pairs_file, tmp_path, seed=0, progress=shown)
    told = capfd.readouterr().err
    # Those of datasets and of weights are hidden by the commands.
    assert ("Computing reference log probs" in told) == shown


def test_the_loss_of_dpo_is_minus_log_sigmoid_of_the_margin(student, pairs_file, tmp_path):
    """Against the definition, on one validation pair set, by plain forward passes."""
    settings = TuneSettings(**{**TUNE, "beta": 0.3, "max_steps": 3})
    tune.run(settings, student, pairs_file, tmp_path, seed=0, progress=False)
    held_out = json.loads((tmp_path / "summary.json").read_text())["validation_prompts"]
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    margins = [margin(tmp_path / tune.TEACHER, student, row) for row in rows if row["prompt_id"] in held_out]
    expected = torch.nn.functional.softplus(-0.3 * torch.tensor(margins)).mean()
    assert metrics(tmp_path)[-1]["eval_loss"] == pytest.approx(float(expected), abs=1e-5)


def test_the_same_tuning_twice_gives_the_same_bytes(tuned, student, pairs_file, tmp_path):
    tune.run(TuneSettings(**TUNE), student, pairs_file, tmp_path, seed=0, progress=False)
    for name in ("metrics.jsonl", "summary.json", "teacher/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tuned[0] / name).read_bytes(), name


def test_a_killed_tuning_goes_on_to_the_same_bytes(tuned, student, pairs_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(KilledError):
            tune.run(TuneSettings(**TUNE), student, pairs_file, tmp_path, seed=0, progress=False)
    left = sorted(path.name for path in (tmp_path / fit.CHECKPOINTS).glob("checkpoint-*"))
    assert left and not (tmp_path / tune.TEACHER).exists()
    # The last checkpoint was cut short, so that the one before it is used.
    (tmp_path / fit.CHECKPOINTS / left[-1] / "optimizer.pt").write_bytes(b"PK")
    tune.run(TuneSettings(**TUNE), student, pairs_file, tmp_path, seed=0, progress=False)
    for name in ("metrics.jsonl", "teacher/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tuned[0] / name).read_bytes(), name


def test_a_kill_while_checkpoints_are_dropped_costs_nothing(tuned, student, pairs_file, tmp_path, monkeypatch):
    remove = shutil.rmtree

    def half(path, **options):
        if Path(path).name == fit.CHECKPOINTS:
            next(Path(path).rglob("*.arrow")).unlink()
            raise KilledError
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(KilledError):
            tune.run(TuneSettings(**TUNE), student, pairs_file, tmp_path, seed=0, progress=False)
    monkeypatch.setattr(tune, "load_model", None)
    assert tune.run(TuneSettings(**TUNE), student, pairs_file, tmp_path, seed=0, progress=False) == tuned[1]
    assert not (tmp_path / fit.CHECKPOINTS).exists()


def test_lora_is_merged_and_leaves_embeddings_alone(student, pairs_file, tmp_path):
    settings = TuneSettings(**{**TUNE, "learning_rate": 1e-2}, lora=LoraSettings(r=2))
    tune.run(settings, student, pairs_file, tmp_path, seed=0, progress=False)
    before, after = weights(student), weights(tmp_path / tune.TEACHER)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("proj" in name for name in changed)


NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
KINDS = {
    # It has router logits, and no count of experts under the name that TRL looks for.
    "granitemoehybrid": lambda size: transformers.GraniteMoeHybridConfig(
        **NARROW, vocab_size=size, layer_types=["mamba", "attention"], num_local_experts=4, num_experts_per_tok=2,
        shared_intermediate_size=8, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=4,
    ),
    "falcon_h1": lambda size: transformers.FalconH1Config(
        **NARROW, vocab_size=size, head_dim=4, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4,
        mamba_chunk_size=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "lora"), [("granitemoehybrid", None), ("falcon_h1", LoraSettings(r=2))])
def test_experts_and_state_spaces_are_tuned(kind, lora, student, pairs_file, tmp_path):
    _, tokenizer = load_model(student)
    torch.manual_seed(0)
    teacher = transformers.AutoModelForCausalLM.from_config(KINDS[kind](len(tokenizer)))
    teacher.save_pretrained(tmp_path / "before")
    tokenizer.save_pretrained(tmp_path / "before")
    settings = TuneSettings(**{**TUNE, "learning_rate": 1e-2}, lora=lora)
    tune.run(settings, tmp_path / "before", pairs_file, tmp_path, seed=0, progress=False)
    before, after = weights(tmp_path / "before"), weights(tmp_path / tune.TEACHER)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not any("aux_loss" in line for line in (tmp_path / fit.METRICS_FILE).read_text().splitlines())


@pytest.fixture(scope="module")
def adapted(student, tmp_path_factory):
    """A teacher that is an adapter on `student`."""
    path = tmp_path_factory.mktemp("adapted")
    model, _ = load_model(student)
    torch.manual_seed(1)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(path)
    # So that it is found however the model was loaded.
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(student)}))
    return path


@pytest.mark.parametrize("objective", ["dpo", "sft"])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)])
def test_a_teacher_that_is_an_adapter_is_tuned_from_where_it_stands(adapted, lora, objective, pairs_file, tmp_path):
    settings = TuneSettings(objective=objective, **{**TUNE, "learning_rate": 1e-3}, lora=lora)
    tune.run(settings, adapted, pairs_file, tmp_path, seed=0, progress=False)
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    gained = [margin(tmp_path / tune.TEACHER, adapted, row) for row in rows[:6]]
    # Not far: the adapter that it began with is still there.
    assert 0 < max(map(abs, gained)) < 5
    if objective == "dpo":
        (first, *_) = (entry for entry in metrics(tmp_path) if "rewards/margins" in entry)
        assert sum(gained) > 0 and abs(first["rewards/margins"]) < 1e-4


def test_sft_raises_the_chosen_texts(student, pairs_file, tmp_path):
    settings = TuneSettings(objective="sft", **{**TUNE, "learning_rate": 3e-3})
    summary = tune.run(settings, student, pairs_file, tmp_path, seed=0, progress=False)
    assert summary["num_validation_pairs"] == 0
    losses = [entry["loss"] for entry in metrics(tmp_path) if "loss" in entry]
    assert losses[-1] < losses[0] - 0.02
    row = json.loads(pairs_file.read_text().splitlines()[0])
    assert margin(tmp_path / tune.TEACHER, student, {**row, "rejected": row["chosen"]}) == 0
    assert distance(weights(student), weights(tmp_path / tune.TEACHER)) > 1e-4


def test_prompt_ids_are_those_of_generation(student):
    """Token for token: generation feeds tokenizer(prompt, add_special_tokens=False)."""
    _, tokenizer = load_model(student)
    rows = [{**row, "chosen": row["completion"], "rejected": "blue red"} for row in make_generated(3)]
    rows[0]["chosen_ends"] = True
    for row, pair in zip(rows, tune.encode_pairs(rows, tokenizer), strict=True):
        assert pair["prompt_ids"] == tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        chosen = tokenizer(row["chosen"], add_special_tokens=False)["input_ids"]
        assert pair["chosen_ids"] == chosen + ([tokenizer.eos_token_id] if row.get("chosen_ends") else [])


def test_the_teacher_learns_the_tokens_that_it_wrote(student):
    """Not those that its text would be cut into, which need not be the same, nor end with the same token."""
    _, tokenizer = load_model(student)
    row = make_generated(1)[0] | {"chosen": "blue red", "rejected": "red", "chosen_ends": True, "rejected_ends": True}
    row |= {"chosen_ids": [9, 8, 3], "rejected_ids": None}
    (pair,) = tune.encode_pairs([row], tokenizer)
    red = tokenizer("red", add_special_tokens=False)["input_ids"]
    assert (pair["chosen_ids"], pair["rejected_ids"]) == ([9, 8, 3], [*red, tokenizer.eos_token_id])


def bpe_tokenizer(prepend: str | None):
    """A byte-level tokenizer, or one that puts a word boundary before every text; both add a bos token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    if prepend is None:
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend(prepend), normalizers.Replace(" ", prepend)])
        inner.decoder = decoders.Sequence([decoders.Replace(prepend, " "), decoders.Strip(" ", 1, 0)])
    corpus = [" ".join(row.values()) for row in make_text_rows(50)] + ["a\nb 1 ( <i>name a colour</i>\n<i>say"]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if prepend is None else ["\n", "<", ">", "/", "1", "("]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
    inner.train_from_iterator(corpus, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("prepend", [None, "▁"], ids=["byte_level", "word_boundary"])
def test_no_token_spans_prompt_and_completion(prepend):
    tokenizer = bpe_tokenizer(prepend)
    prompt, completion = "<s><i>name a colour</i>\n<i>", "say hello</i>"
    ((prompt_ids, completion_ids),) = encode_continuations([(prompt, completion)], tokenizer)
    assert prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert prompt_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(prompt_ids + completion_ids) == prompt + completion
    # Neither a boundary of words nor a bos token in the middle of the text.
    assert tokenizer.convert_ids_to_tokens(completion_ids)[0].startswith("s")


def test_validation_prompts_are_whole_prompts_and_repeat():
    names = [f"p{i}" for i in range(20) for _ in range(3)]
    chosen = tune.validation_prompts(names, 0.1, seed=1)
    assert len(chosen) == 2 and chosen == tune.validation_prompts(names[::-1], 0.1, seed=1)
    assert tune.validation_prompts(["p"] * 4, 0.5, seed=1) == set()
    assert len(tune.validation_prompts(["p", "q"], 0.9, seed=1)) == 1


def test_pairs_that_are_too_long_are_left_out_and_counted(student, tmp_path):
    rows = make_generated(2, siblings=2)
    rows[0]["completion"] = "say " * 60
    pairs.run(pairs.PairSettings(), rows, make_signal([1, -1, 1, -1]), tmp_path / "pairs")
    file = tmp_path / "pairs" / pairs.PAIRS_FILE
    summary = tune.run(TuneSettings(**TUNE), student, file, tmp_path / "out", seed=0, progress=False)
    assert (summary["num_too_long"], summary["num_pairs"]) == (1, 1)
    with pytest.raises(DataError, match="each of the 2 pairs has more than 4 tokens"):
        tune.run(TuneSettings(**TUNE, max_length=4), student, file, tmp_path / "none", seed=0, progress=False)


def test_a_teacher_whose_weights_are_not_finite_is_none(student, pairs_file, tmp_path):
    wild = {"learning_rate": 1e30, "max_grad_norm": None, "num_train_epochs": 2}
    with pytest.raises(ModelError, match=r"teacher: training has led to weights that are not finite"):
        tune.run(TuneSettings(**TUNE | wild), student, pairs_file, tmp_path, seed=0, progress=False)
    assert not (tmp_path / tune.TEACHER).exists()


def test_the_share_of_validation_pairs_is_one_of_pairs(student, pairs_file, tmp_path):
    """Not of batches, of which the last one may be short."""
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    held_out = tune.validation_prompts([row["prompt_id"] for row in rows], 0.5, seed=0)
    validation = [row for row in rows if row["prompt_id"] in held_out][1:]
    write_jsonl(tmp_path / "pairs.jsonl", [row for row in rows if row["prompt_id"] not in held_out] + validation)
    settings = TuneSettings(**TUNE, validation_fraction=0.5)
    tune.run(settings, student, tmp_path / "pairs.jsonl", tmp_path, seed=0, progress=False)
    last = metrics(tmp_path)[-1]
    margins = [margin(tmp_path / tune.TEACHER, student, row) for row in validation]
    assert len(margins) % 2 and 0 < sum(m > 0 for m in margins) < len(margins)
    assert last["eval_rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    assert last["eval_rewards/margins"] == pytest.approx(0.1 * sum(margins) / len(margins), rel=1e-3, abs=1e-6)
