"""Two minutes of ratios on the tiny model, beside those of the last committed run; prints, never fails.

    python -m benchmarks.regress [--write]

`score / plain`: time of scoring over plain forward + backward. `real / score`: one real step per candidate, the
reference after each, over scoring. `1 − Pearson`: disagreement with the real steps. On another machine ratios differ.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, parser, write_result
from benchmarks.peers.montessori_peer import FirstOrder, Montessori, RealStep
from benchmarks.peers.task import Task, save
from benchmarks.peers.worker import measure
from benchmarks.students import add_model_options, examples_of, student_checkpoint
from montessori.agreement import Agreement

METHODS = {"anchored": Montessori, "first order": FirstOrder}
REPEATS = 5


def run(path: Path) -> dict[str, float]:
    """Ratios by name."""
    torch.manual_seed(0)
    real = measure(Task.load(path), RealStep, 1)
    ratios = {}
    for name, method in METHODS.items():
        result = measure(Task.load(path), method, REPEATS)
        pairs = zip(result["seconds"]["score"], result["seconds"]["plain"], strict=True)
        scores, truth = (torch.tensor(r["scores"]).numpy() for r in (result, real))
        ratios[f"{name}: score / plain"] = statistics.median(score / plain for score, plain in pairs)
        ratios[f"{name}: real / score"] = real["seconds"]["score"][0] / statistics.median(result["seconds"]["score"])
        ratios[f"{name}: 1 − Pearson"] = 1 - Agreement.of(scores, truth).pearson
    return ratios


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    add_model_options(options, scored=16, references=8)
    options.set_defaults(model="tiny", work=Path("out/regress"))
    options.add_argument("--write", action="store_true", help="make this run the one to compare with")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    candidates, references, rest = examples_of(arguments)
    path = arguments.work / "regress" / "task.json"
    save(path, student_checkpoint(arguments, rest), candidates, references, batch_size=8)
    ratios = run(path)
    committed = RESULTS / "regress.json"
    before = json.loads(committed.read_text(encoding="utf-8"))["ratios"] if committed.exists() else {}
    table = Table(title="ratios, and those of the last committed run")
    for column in ("", "now", "committed", "now / committed"):
        table.add_column(column)
    for name, value in ratios.items():
        old = before.get(name)
        table.add_row(name, f"{value:.3g}", f"{old:.3g}" if old else "", f"{value / old:.2f}" if old else "")
    Console().print(table)
    if arguments.write:
        del arguments.write
        print(f"wrote {write_result('regress', arguments, {'ratios': ratios})}")


if __name__ == "__main__":
    main()
