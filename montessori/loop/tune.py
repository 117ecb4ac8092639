"""The teacher learns to write more of what helped: DPO on pairs, or plain fine-tuning on the helpful half."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from montessori import processes
from montessori.batching import IGNORE_INDEX, Example
from montessori.data import load_rows
from montessori.encoding import encode_continuations
from montessori.errors import DataError, ModelError
from montessori.loop.fit import (
    CHECKPOINTS,
    FitSettings,
    finish,
    finished,
    fit_examples,
    metrics_of,
    run_trainer,
    training_arguments,
)
from montessori.loop.rows import length_limit
from montessori.loop.section import Section
from montessori.models import load_model
from montessori.training import check_float32

TEACHER = "teacher"
# Kernels of these read the weights of such modules past them, so PEFT refuses adapters there.
_STATE_SPACES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_PAST_THEIR_MODULE = ["out_proj", "conv1d"]


class LoraSettings(Section):
    """Low-rank adapters on all linear layers; they are merged into the weights at the end."""

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class TuneSettings(FitSettings):
    """How the teacher is tuned.

    `objective`: "dpo", or "sft" to fine-tune on the chosen texts alone. `beta`: strength of the pull
    towards the untuned teacher. Of DPO, `validation_fraction` of the prompts, at least one, is set aside and only
    evaluated. `lora` trains adapters instead of all weights. Pairs longer than `max_length` are left out.
    """

    objective: Literal["dpo", "sft"] = "dpo"
    beta: float = Field(default=0.1, gt=0)
    learning_rate: float = Field(default=1e-6, gt=0)
    batch_size: int = Field(default=2, ge=1)
    per_device_train_batch_size: int = Field(default=2, ge=1)
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    lora: LoraSettings | None = None


def run(
    settings: TuneSettings, teacher: str | os.PathLike[str], pairs: Path, out: Path, *, seed: int, progress: bool = True
) -> dict[str, Any]:
    """Tune `teacher` on the file `pairs`; write `out/teacher`, `out/metrics.jsonl` and `out/summary.json`.

    Returns counts: pairs trained on, pairs held out, pairs left out because a side is longer than
    `max_length`, and the tokens of all epochs. Killed and called again it goes on from its last checkpoint.
    On several processes (torchrun) every process calls it.
    Raises DataError when no pair can be trained on, ModelError unless the weights are float32.
    """
    if (before := finished(out / TEACHER)) is not None:
        return {key: value for key, value in before.items() if key != "validation_prompts"}
    rows = load_rows(pairs)
    model, tokenizer = load_model(teacher)
    check_float32(model)
    if settings.lora is not None and hasattr(model, "merge_and_unload"):
        # New adapters go on the teacher as it is, which is also what DPO compares with.
        model = model.merge_and_unload()
    limit = length_limit(model, settings.max_length, "tune")
    encoded = encode_pairs(rows, tokenizer)
    kept = [pair for pair in encoded if _longest(pair) <= limit]
    if not kept:
        raise DataError(
            f"{pairs}: each of the {len(encoded)} pairs has more than {limit} tokens: raise tune.max_length, or "
            "shorten the prompts"
        )
    fraction = settings.validation_fraction if settings.objective == "dpo" else 0
    held_out = validation_prompts([pair["prompt_id"] for pair in kept], fraction, seed)
    training = [pair for pair in kept if pair["prompt_id"] not in held_out]
    validation = [pair for pair in kept if pair["prompt_id"] in held_out]
    if settings.objective == "dpo":
        model, metrics = _dpo(settings, model, tokenizer, training, validation, out, seed, progress)
    else:
        model, metrics = _sft(settings, model, tokenizer, training, out, seed, progress)
    summary = {
        "num_pairs": len(training),
        "num_validation_pairs": len(validation),
        "num_too_long": len(encoded) - len(kept),
        "tokens": _tokens(settings, training),
    }
    finish(model, tokenizer, out / TEACHER, metrics, {**summary, "validation_prompts": sorted(held_out)})
    return summary


def encode_pairs(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Token ids of the pairs: `prompt_ids` as generation fed them, `chosen_ids`, `rejected_ids`.

    A side is what the teacher wrote, token for token, where the row holds that. Otherwise its text is tokenised
    on its own, and ends with the tokenizer's end-of-text token if the teacher ended it (`chosen_ends`,
    `rejected_ends`).
    """
    texts = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    encoded = iter(encode_continuations(texts, tokenizer, "pairs"))
    pairs = []
    for row in rows:
        pair: dict[str, Any] = {"prompt_id": row["prompt_id"]}
        for side in ("chosen", "rejected"):
            prompt, completion = next(encoded)
            end = [tokenizer.eos_token_id] if row.get(f"{side}_ends") else []
            pair |= {"prompt_ids": prompt, f"{side}_ids": row.get(f"{side}_ids") or completion + end}
        pairs.append(pair)
    return pairs


def validation_prompts(prompt_ids: Sequence[str], fraction: float, seed: int) -> set[str]:
    """A random share of the distinct prompts, at least one of several; the same for the same seed."""
    prompts = sorted(set(prompt_ids))
    if fraction == 0 or len(prompts) < 2:
        return set()
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    return set(random.Random(seed).sample(prompts, count))


def _tokens(settings: TuneSettings, training: Sequence[Mapping[str, Any]]) -> int:
    """The tokens trained on; a prompt counts with each text that follows it."""
    if settings.objective == "dpo":
        sizes = [2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in training]
    else:
        sizes = [example.num_tokens for example in _examples(training)]
    return settings.tokens(len(sizes), sum(sizes))


def _longest(pair: Mapping[str, Any]) -> int:
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def _dpo(
    settings: TuneSettings,
    model: Any,
    tokenizer: Any,
    training: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    out: Path,
    seed: int,
    progress: bool,
) -> tuple[Any, list[dict[str, Any]]]:
    trl = _import_trl()
    arguments = training_arguments(
        settings,
        trl.DPOConfig,
        out,
        len(training),
        seed,
        progress,
        beta=settings.beta,
        precompute_ref_log_probs=True,
        # TRL's shares are means over batches, and a last one of fewer pairs would count as much.
        per_device_eval_batch_size=1,
        max_length=None,
        eval_strategy="no",
        **_without_router_loss(trl),
    )
    tokenizer = copy.deepcopy(tokenizer)
    with _bars(trl, progress):
        trainer = _trainer_class(trl)(
            model=model,
            args=arguments,
            train_dataset=_on_disk(training, out / CHECKPOINTS / "training_pairs"),
            eval_dataset=_on_disk(validation, out / CHECKPOINTS / "validation_pairs") if validation else None,
            processing_class=tokenizer,
            peft_config=_lora(settings.lora, model),
        )
        run_trainer(trainer, out)
        if validation:
            trainer.evaluate()
    tuned = trainer.accelerator.unwrap_model(trainer.model)
    if settings.lora is not None:
        tuned = tuned.merge_and_unload()
    # The adapter that a teacher came with, which TRL has kept to compare with.
    if "ref" in getattr(tuned, "peft_config", {}):
        tuned.delete_adapter("ref")
    return tuned, metrics_of(trainer)


@contextmanager
def _bars(trl: Any, shown: bool) -> Iterator[None]:
    """TRL's own bar of the reference's log-probabilities, which Trainer's arguments do not hide."""
    module = importlib.import_module(trl.DPOTrainer.__module__)
    bar = getattr(module, "tqdm", None)
    if shown or bar is None:
        yield
        return
    module.tqdm = lambda *given, **options: bar(*given, **options | {"disable": True})  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.tqdm = bar  # type: ignore[attr-defined]


def _without_router_loss(trl: Any) -> dict[str, float]:
    """DPO alone: of mixtures of experts TRL would add the loss that balances routers, which not all of them have."""
    known = "router_aux_loss_coef" in {field.name for field in dataclasses.fields(trl.DPOConfig)}
    return {"router_aux_loss_coef": 0.0} if known else {}


def _trainer_class(trl: Any) -> type:
    class Trainer(trl.DPOTrainer):
        """DPOTrainer on token ids: its own tokenisation would join prompt and completion, and end both."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return Trainer


def _on_disk(pairs: Sequence[Mapping[str, Any]], path: Path) -> Any:
    """The pairs as a dataset below `path`.

    DPOTrainer hands the reference log-probabilities of the first process to the others through a file
    beside the dataset's own; a dataset in memory has none, and the others would look in vain.
    """
    import datasets

    if processes.is_main() and not path.exists():
        partial = path.with_name(f".{path.name}")
        shutil.rmtree(partial, ignore_errors=True)
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [{name: pair[name] for name in columns} for pair in pairs]
        datasets.Dataset.from_list(rows).save_to_disk(str(partial))
        os.rename(partial, path)
    processes.wait_for_all()
    return datasets.load_from_disk(str(path))


def _lora(settings: LoraSettings | None, model: Any) -> Any:
    if settings is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        exclude_modules=_PAST_THEIR_MODULE if model.config.model_type in _STATE_SPACES else None,
        task_type="CAUSAL_LM",
    )


def _sft(
    settings: TuneSettings,
    model: Any,
    tokenizer: Any,
    training: Sequence[Mapping[str, Any]],
    out: Path,
    seed: int,
    progress: bool,
) -> tuple[Any, list[dict[str, Any]]]:
    if settings.lora is not None:
        from peft import get_peft_model

        torch.manual_seed(seed)
        model = get_peft_model(model, _lora(settings.lora, model))
    metrics = fit_examples(settings, model, tokenizer, _examples(training), out, seed, progress)
    return (model.merge_and_unload() if settings.lora is not None else model), metrics


def _examples(training: Sequence[Mapping[str, Any]]) -> list[Example]:
    # A text that is chosen over several siblings is learned once.
    distinct = {(*pair["prompt_ids"], -1, *pair["chosen_ids"]): pair for pair in training}.values()
    return [_example(pair, index) for index, pair in enumerate(distinct)]


def _example(pair: Mapping[str, Any], index: int) -> Example:
    prompt, chosen = pair["prompt_ids"], pair["chosen_ids"]
    labels = [IGNORE_INDEX] * len(prompt) + chosen
    return Example(torch.tensor(prompt + chosen), torch.tensor(labels), index)


def _import_trl() -> Any:
    try:
        import trl
    except ImportError as error:
        raise ModelError(f"tune needs trl ({error}): pip install trl peft") from error
    return trl
