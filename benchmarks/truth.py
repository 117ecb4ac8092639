"""Agreement with real float32 steps: of every method and precision, of other geometries, of a step on bfloat16 weights.

    python -m benchmarks.truth --candidates seed_tasks_175.jsonl --reference reference_256.jsonl
    ... --model tiny

`smollm2` gives one row per method at the settings of the other benchmarks, with `--precisions` one per way to store
weights, m and v. `tiny` warms a small model up anew for each
point of four sweeps: learning rate, length of the warm-up, beta2 and length of the candidates; the others stay at lr
5e-6, 12 steps, 0.999 and 128 tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common import parser, write_result
from benchmarks.students import add_model_options, examples_of, load_student, make_tiny, student_checkpoint, train
from montessori import InfluenceEstimator
from montessori.agreement import Agreement
from montessori.batching import IGNORE_INDEX, Example
from montessori.checkpoints import read_state
from montessori.losses import response_loss
from montessori.optim_state import AdamWState
from montessori.oracle import apply_step, example_gradients, restore, restored
from montessori.referenceset import ReferenceSets
from montessori.steps import AdamWStep

REAL = "real step, float32"
REAL_ROUNDED = "real step, float32, from bfloat16 weights"


@dataclass(frozen=True)
class Setting:
    """Where the step is taken: of these, a sweep changes one."""

    lr: float = 5e-6
    warmup_steps: int = 12
    beta2: float = 0.999
    candidate_tokens: int = 128


SWEEPS: dict[str, tuple[float, ...]] = {
    "lr": (5e-7, 5e-6, 5e-5, 5e-4, 2e-3, 5e-3),
    "warmup_steps": (1, 4, 12, 50, 300),
    "beta2": (0.9, 0.95, 0.99, 0.999),
    "candidate_tokens": (16, 32, 64, 128),
}


@dataclass(frozen=True)
class Problem:
    """A warmed-up model, its optimizer state, candidates and references."""

    model: nn.Module
    state: AdamWState
    candidates: Sequence[Example]
    references: Sequence[Example]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @property
    def reference_sets(self) -> ReferenceSets:
        return ReferenceSets({"reference": self.references}, "example_mean", 4096)


def estimated(problem: Problem, method: str, **settings: Any) -> tuple[np.ndarray, list[float]]:
    """Influence [N] by the estimator, and the curvature that it saw."""
    references, candidates = ([_row(e) for e in part] for part in (problem.references, problem.candidates))
    scores = InfluenceEstimator(problem.model, problem.state, references, method, **settings).score(candidates)
    return scores.influence, scores.info["curvature"]


def _row(example: Example) -> dict[str, list[int]]:
    return {"input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}


def frozen_v(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param: Tensor, step: AdamWStep) -> Tensor:
    """−Δ linearised in g: the second moment stays that of the optimizer, without the candidate's own gradient."""
    exp_avg_hat = (step.beta1 * exp_avg + (1 - step.beta1) * grad) / (1 - step.beta1**step.step)
    exp_avg_sq_hat = exp_avg_sq / (1 - step.beta2 ** (step.step - 1))
    return step.lr * (exp_avg_hat / (exp_avg_sq_hat.sqrt() + step.eps) + step.weight_decay * param)


def geometries(problem: Problem) -> dict[str, np.ndarray]:
    """First-order scores [N] with v frozen, and plain gradient dot products, from whole gradients one by one."""
    parameters = problem.parameters
    q, _ = problem.reference_sets.gradient(problem.model, parameters, response_loss)
    scores: dict[str, list[float]] = {"v frozen": [], "gradient dot product": []}
    for example in problem.candidates:
        grads, _ = example_gradients(problem.model, parameters, example, response_loss)
        totals = dict.fromkeys(scores, 0.0)
        with torch.no_grad():
            for name, parameter in parameters.items():
                grad, entry = grads[name], problem.state[name]
                linear = frozen_v(grad, entry.exp_avg, entry.exp_avg_sq, parameter, entry.step)
                totals["v frozen"] += float((q[name][0] * linear).sum(dtype=torch.float64))
                totals["gradient dot product"] += float((q[name][0] * grad).sum(dtype=torch.float64))
        for name, value in totals.items():
            scores[name].append(value)
    return {name: np.array(values) for name, values in scores.items()}


def bfloat16_steps(problem: Problem) -> np.ndarray:
    """Influence [N] as a script measures it that steps and evaluates the problem's bfloat16 parameters."""
    model, parameters, sets = problem.model, problem.parameters, problem.reference_sets
    influence = []
    with restored(parameters) as saved:
        before = float(sets.loss(model, response_loss)[0])
        for example in problem.candidates:
            grads, _ = example_gradients(model, parameters, example, response_loss)
            apply_step(parameters, problem.state, grads)
            influence.append(before - float(sets.loss(model, response_loss)[0]))
            restore(parameters, saved)
    return np.array(influence)


def in_bfloat16(moment: Tensor) -> Tensor:
    return moment.bfloat16()


def in_8_bits(moment: Tensor) -> Tensor:
    """What an 8-bit optimizer of bitsandbytes would have kept of it."""
    from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise

    table = create_dynamic_map(signed=bool((moment < 0).any()))
    return dequantize_blockwise(*quantize_blockwise(moment, code=table, blocksize=256))


def stored(state: AdamWState, store: Callable[[Tensor], Tensor]) -> AdamWState:
    """The state with its moments as `store` keeps them."""
    return AdamWState(
        {
            name: replace(entry, **{label: store(tensor) for label, tensor in entry.tensors()})
            for name, entry in state.items()
        }
    )


def by_precision(problem: Problem) -> dict[str, np.ndarray]:
    """Influence [N] per precision of m and v, of the model and of the reference gradient, and the real steps."""
    rounded = replace(problem, model=copy.deepcopy(problem.model).bfloat16())
    scores = {REAL: estimated(problem, "exact")[0], REAL_ROUNDED: estimated(rounded, "exact")[0]}
    scores["anchored, float32"], _ = estimated(problem, "anchored")
    scores["anchored, bfloat16 model"], _ = estimated(rounded, "anchored")
    for name, store in (("bfloat16", in_bfloat16), ("8-bit", in_8_bits)):
        state = stored(problem.state, store)
        scores[f"anchored, {name} m and v"], _ = estimated(replace(problem, state=state), "anchored")
        scores[f"anchored, bfloat16 model, {name} m and v"], _ = estimated(replace(rounded, state=state), "anchored")
    scores["first order, float32"], _ = estimated(problem, "first_order")
    scores["first order, bfloat16 model"], _ = estimated(rounded, "first_order")
    narrow = replace(rounded, state=stored(problem.state, in_bfloat16))
    scores["first order, bfloat16 model, m, v and q"], _ = estimated(narrow, "first_order", reference_dtype="model")
    return scores


def compare(problem: Problem) -> dict[str, Any]:
    """Agreement with the real steps per method, the influences themselves, and the anchor's curvature."""
    influence: dict[str, np.ndarray] = {REAL: estimated(problem, "exact")[0]}
    influence["anchored"], curvature = estimated(problem, "anchored")
    influence["first order"], _ = estimated(problem, "first_order")
    influence |= geometries(problem)
    # Rounding the weights moves every influence, so these have a truth of their own.
    rounded = replace(problem, model=copy.deepcopy(problem.model).bfloat16())
    influence[REAL_ROUNDED] = estimated(rounded, "exact")[0]
    influence["anchored, bfloat16 model"], _ = estimated(rounded, "anchored")
    influence["real step on bfloat16 parameters"] = bfloat16_steps(rounded)
    return {**compared(influence), "curvature": curvature}


def compared(influence: dict[str, np.ndarray]) -> dict[str, Any]:
    """Agreement of each score with its real steps, and the influences themselves, for JSON."""
    agreement = {}
    for name, values in influence.items():
        if name not in (REAL, REAL_ROUNDED):
            agreement[name] = Agreement.of(values, influence[truth_of(name)]).to_dict()
    # A dot product of gradients is no change of the loss.
    for key in ("median_relative_error", "max_relative_error"):
        agreement.get("gradient dot product", {}).pop(key, None)
    return {"agreement": agreement, "influence": {name: values.tolist() for name, values in influence.items()}}


def truth_of(name: str) -> str:
    """Name of the real steps that scores of this name should be."""
    return REAL_ROUNDED if "bfloat16 model" in name or "bfloat16 parameters" in name else REAL


def warmed(tiny: nn.Module, setting: Setting, examples: Sequence[Example]) -> tuple[nn.Module, AdamWState]:
    """A copy of the model after AdamW's steps at the setting, and the state after them."""
    model = copy.deepcopy(tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, betas=(0.9, setting.beta2), weight_decay=0.0)
    train(model, optimizer, list(examples), setting.warmup_steps)
    return model, AdamWState.from_optimizer(model, optimizer)


def cut(examples: Sequence[Example], length: int) -> list[Example]:
    """At most `length` tokens of each example, half of them before its first label."""
    short = []
    for example in examples:
        first = int((example.labels != IGNORE_INDEX).nonzero()[0])
        start = max(0, first - length // 2) if example.num_tokens > length else 0
        span = slice(start, start + length)
        short.append(Example(example.input_ids[span], example.labels[span], example.index))
    return short


def sweep_all(
    candidates: Sequence[Example], references: Sequence[Example], rest: Sequence[Example]
) -> dict[str, list[dict[str, Any]]]:
    """Agreement at each value of each setting; the sweeps share the point where they cross."""
    tiny, points = make_tiny(list(rest)), {}
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for name, values in SWEEPS.items():
        sweeps[name] = []
        for value in values:
            setting = replace(Setting(), **{name: value})
            if setting not in points:
                model, state = warmed(tiny, setting, rest)
                points[setting] = compare(Problem(model, state, cut(candidates, setting.candidate_tokens), references))
                del points[setting]["influence"]
            sweeps[name].append({"value": value, **points[setting]})
            print(f"{name} {value}: anchored {points[setting]['agreement']['anchored']['pearson']:.6f}", flush=True)
    return sweeps


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    add_model_options(options, scored=12, references=4)
    options.add_argument(
        "--precisions", action="store_true", help="of smollm2: every way to store m and v, and weights"
    )
    arguments = options.parse_args()
    if arguments.precisions and arguments.model != "smollm2":
        options.error(f"--precisions: expected --model smollm2, got {arguments.model}")
    torch.set_num_threads(arguments.threads)
    candidates, references, rest = examples_of(arguments)
    if arguments.model == "tiny":
        sweeps = sweep_all(candidates, references, rest)
        path = write_result("truth_tiny", arguments, {"sweeps": sweeps})
        rows = {f"{name} {row['value']}": row for name, part in sweeps.items() for row in part}
    else:
        checkpoint = student_checkpoint(arguments, rest)
        model = load_student(checkpoint)
        problem = Problem(model, read_state(checkpoint, model), candidates, references)
        result = compared(by_precision(problem)) if arguments.precisions else compare(problem)
        path = write_result("truth_precisions" if arguments.precisions else "truth_smollm2", arguments, result)
        rows = {arguments.model: result}
    show(rows)
    print(f"wrote {path}")


def show(rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title="agreement with real float32 steps: Pearson, Spearman, sign")
    methods = list(next(iter(rows.values()))["agreement"])
    for column in ("", *methods):
        table.add_column(column)
    for name, row in rows.items():
        cells = (row["agreement"][method] for method in methods)
        table.add_row(name, *(f"{a['pearson']:.4f} {a['spearman']:.3f} {a['sign_agreement']:.0%}" for a in cells))
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
