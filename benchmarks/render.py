"""Write the tables of README.md from the JSON files under benchmarks/results.

python -m benchmarks.render
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

README = Path(__file__).parent.parent / "README.md"


def fidelity(records: list[dict[str, Any]]) -> str:
    lines = [
        "| warm-up | method | candidates | Pearson | Spearman | sign agreement | median relative error |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        settings = record["settings"]
        clipped = f", clipped at {settings['warmup_max_grad_norm']}" if settings["warmup_max_grad_norm"] else ""
        warmup = f"batch {settings['warmup_batch_size']}{clipped}"
        for kind, label in (("agreement", ""), ("centred_agreement", ", centred")):
            for method, a in record[kind].items():
                lines.append(
                    f"| {warmup} | `{method}`{label} | {a['num_examples']} "
                    f"| {a['pearson']:.6f} | {a['spearman']:.4f} | {a['sign_agreement']:.0%} "
                    f"| {a['median_relative_error']:.2%} |"
                )
    return "\n".join(lines)


def speed(records: list[dict[str, Any]]) -> str:
    lines = [
        "| threads | backend | plain forward + backward | score | time ratio | once (q, anchor, proof) |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        plain, score = (statistics.median(record["seconds"][key]) for key in ("plain", "score"))
        low, high = record["ratio_spread"]
        lines.append(
            f"| {record['machine']['threads']} | {record['backend']} | {record['tokens'] / plain:.0f} tokens/s "
            f"| {record['tokens'] / score:.0f} tokens/s | {record['ratio_median']:.2f} ({low:.2f}–{high:.2f}) "
            f"| {record['seconds']['once']:.0f} s |"
        )
    return "\n".join(lines)


def _records(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]


def main() -> None:
    text = README.read_text(encoding="utf-8")
    tables = {
        "fidelity": fidelity(
            sorted(_records("fidelity_*.json"), key=lambda record: record["settings"]["warmup_max_grad_norm"] or 0)
        ),
        "speed": speed(_records("speed_*.json")),
    }
    for name, table in tables.items():
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text = re.sub(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
