"""Write the tables of README.md and of docs from the JSON files under benchmarks/results.

python -m benchmarks.render
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.common import RESULTS

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in ("kernels", "performance", "supported")))
LINEAR = {"linear triton": "Triton", "linear wgmma": "`wgmma`", "linear wgmma_cluster": "`wgmma_cluster`",
          "linear mma": "`mma`", "linear unfused": "unfused"}  # fmt: skip
SCORES = {"score triton": "TinyLlama-1.1B", "score cuda": "TinyLlama-1.1B", "score mixed": "TinyLlama-1.1B, mixed",
          "score 8B": "Llama-3-8B"}  # fmt: skip


@dataclass(frozen=True)
class Version:
    """A version of the fused kernel, with its predicted time over that of the product at T = 64, 256 and 1024."""

    name: str
    tile: str
    predicted: tuple[str, str, str]
    limit: str
    section: str
    state: str


VERSIONS = (
    Version("product per example, then the map in torch", "–", ("", "", ""), "m, v, q, g through memory",
            "linear unfused", "float32"),
    Version("Triton, 9.0", "128 × 64, float32 in registers", ("8.6", "4.7", "3.7"), "L2, then the map alone",
            "linear triton", "float32"),
    Version("CUDA `mma` on an H100", "128 × 128, bfloat16 in shared memory", ("7.4", "3.6", "2.6"),
            "L2 and mma.sync at 0.5 PFLOP/s, then the map alone", "linear mma", "bfloat16"),
    Version("CUDA `wgmma`", "64 × 128, float32 in shared memory", ("5.2", "3.4", "3.4"), "L2",
            "linear wgmma", "float32"),
    Version("CUDA `wgmma`", "128 × 128, bfloat16 in shared memory", ("5.2", "2.3", "2.3"), "L2",
            "linear wgmma", "bfloat16"),
    Version("CUDA `wgmma_cluster`", "256 × 256 by 8 blocks, float32", ("5.2", "1.8", "1.4"),
            "shared memory; at T = 64 the map", "linear wgmma_cluster", "float32"),
    Version("CUDA `wgmma_cluster`", "256 × 256 by 4 blocks, bfloat16", ("5.2", "1.3", "1.1"),
            "shared memory; at T = 64 the map", "linear wgmma_cluster", "bfloat16"),
)  # fmt: skip


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
        "| processor | backend | threads | products | tokens | plain | trimmed | score "
        "| score / plain | score / trimmed | quarter / plain | quarter's Spearman |",
        "|---" * 12 + "|",
    ]
    for record in records:
        ratios = record["speed"]
        rates = [record["tokens"] / statistics.median(record["seconds"][arm]) for arm in ("plain", "trimmed", "score")]
        sampled = ["–", "–"]
        if "sampled/plain" in ratios:
            sampled = [_ratio(ratios["sampled/plain"]), f"{record['sampled_spearman']:.3f}"]
        cells = [
            *_run(record),
            *(f"{rate:.0f} tokens/s" for rate in rates),
            _ratio(ratios["score/plain"]),
            _ratio(ratios["score/trimmed"]),
            *sampled,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def once(records: list[dict[str, Any]]) -> str:
    lines = ["| processor | backend | threads | products | tokens | q, anchor and proof |", "|---" * 6 + "|"]
    lines += [f"| {' | '.join(_run(record))} | {record['seconds']['once']:.0f} s |" for record in records]
    return "\n".join(lines)


def products(records: list[dict[str, Any]]) -> str:
    lines = ["| threads | O × I | product | torch, GFLOP/s | ours, GFLOP/s | speed |", "|---|---|---|---|---|---|"]
    for record in records:
        for row in record["rows"]:
            lines.append(
                f"| {record['machine']['threads']} | {row['out']} × {row['in']} | {row['product']} "
                f"| {row['gflops']['torch']:.0f} | {row['gflops']['ours']:.0f} | {_ratio(row['speed'])} |"
            )
    return "\n".join(lines)


def shapes(record: dict[str, Any]) -> str:
    lines = ["| model | tokens an example | plain | trimmed | score | score / plain | score / trimmed |"]
    lines.append("|---" * 7 + "|")
    for row in record["rows"]:
        tokens = row["length"] * row["examples"]
        rates = [tokens / statistics.median(row["seconds"][arm]) for arm in ("plain", "trimmed", "score")]
        speeds = [_ratio(row["speed"][f"score/{to}"]) for to in ("plain", "trimmed")]
        cells = [row["model"], str(row["length"]), *(f"{rate:.0f} tokens/s" for rate in rates), *speeds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sampling(record: dict[str, Any]) -> str:
    lines = ["| share of the tiles | Spearman | Pearson | standard error / spread | error / standard error |"]
    lines.append("|---|---|---|---|---|")
    for row in record["rows"]:
        lines.append(
            f"| {row['sample']} | {row['spearman']:.4f} | {row['pearson']:.4f} "
            f"| {row['error_over_spread']:.3f} | {row['error_over_claimed']:.2f} |"
        )
    return "\n".join(lines)


def kernels(records: list[dict[str, Any]]) -> str:
    lines = [
        "| processor | threads | model | O × I | tokens an example | products | ms | GFLOP/s "
        "| share of the product rate | time / plain dW |",
        "|---" * 10 + "|",
    ]
    for record in records:
        for row in record["rows"]:
            cells = [
                _processor(record),
                str(record["machine"]["threads"]),
                row["model"],
                f"{row['out']} × {row['in']}",
                str(row["length"]),
                record["settings"]["dtype"],
                f"{row['seconds'] * 1e3:.1f}",
                f"{row['gflops']:.0f}",
                f"{row['gflops'] / record['product_gflops']:.0%}",
                f"{row['ratio_to_dw']:.2f} ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def memory(record: dict[str, Any]) -> str:
    peaks = record["peak_rss_bytes"]
    lines = ["| padded tokens of a batch | plain, with m, v, q | preparation | score | whole / plain |"]
    lines.append("|---|---|---|---|---|")
    for tokens in record["settings"]["batch_tokens"]:
        plain, prepare, score = (peaks[f"{phase}/{tokens}"] for phase in ("plain", "prepare", "score"))
        sizes = " | ".join(f"{size / 1e9:.2f} GB" for size in (plain, prepare, score))
        lines.append(f"| {tokens} | {sizes} | {max(prepare, score) / plain:.2f} |")
    return "\n".join(lines)


def profile(record: dict[str, Any]) -> str:
    lines = ["| work | seconds | share |", "|---|---|---|"]
    rows = sorted(record["rows"].items(), key=lambda item: -item[1]["seconds"])
    lines += [f"| {kind} | {row['seconds']:.2f} | {row['share']:.1%} |" for kind, row in rows]
    return "\n".join(lines)


def architectures(record: dict[str, Any]) -> str:
    found = record["architectures"]
    scored = {name: result for name, result in found.items() if "error" in result}
    whole = [name for name, result in scored.items() if "autograd" not in result["coverage"]]
    shares = {
        name: result["coverage"]["autograd"] / sum(result["coverage"].values())
        for name, result in scored.items()
        if name not in whole
    }
    rest = [f"{name} ({share:.1%})" for name, share in shares.items()]
    largest = max(result["error"] for result in scored.values())
    lines = ["| | architectures |", "|---|---|"]
    lines.append(f"| by rules alone | {', '.join(whole)} |")
    lines.append(f"| a share of the parameters by `autograd` | {', '.join(rest)} |")
    for label, key in (("refused", "refused"), ("not built at this size", "unbuilt")):
        if names := [name for name, result in found.items() if key in result]:
            lines.append(f"| {label} | {', '.join(names)} |")
    versions = record["machine"]["versions"]
    return (
        "\n".join(lines)
        + f"\n\ntransformers {versions['transformers']}: {len(scored)} of {len(found)} scored; largest "
        f"difference from the loop, over the largest influence: {largest:.0e}."
    )


def adapters(record: dict[str, Any]) -> str:
    found = record["architectures"]
    rates = ("1e-4", "1e-6")
    lines = [f"| adapter | rules | {' | '.join(f'anchored, lr {rate}' for rate in rates)} | first order, lr 1e-6 |"]
    lines.append("|---|---|---|---|---|")
    for name, result in found.items():
        if "refused" in result:
            lines.append(f"| {name} | refused: {result['refused'].partition(':')[0]} | | | |")
            continue
        anchored, first = result["errors"]["anchored"], result["errors"]["first_order"]
        numbers = " | ".join(f"{value:.0e}" for value in (*anchored, first[-1]))
        lines.append(f"| {name} | {', '.join(result['coverage'])} | {numbers} |")
    return "\n".join(lines)


def gpu_state(records: list[dict[str, Any]]) -> str:
    """What the pages may say of GPUs."""
    if not records:
        return "**Nothing has run on a GPU yet**: times are predictions and marked as such."
    devices = []
    for record in records:
        versions = record["machine"]["versions"]
        failed = [name for name, outcome in record["sections"].items() if "error" in outcome]
        ended = f"did not end well: {', '.join(failed)}" if failed else "all sections ended well"
        devices.append(f"{record['device']['name']} (torch {versions['torch']}, triton {versions['triton']}; {ended})")
    return f"Measured on {'; '.join(devices)}. Predictions are marked as such."


def gpu_versions(records: list[dict[str, Any]]) -> str:
    """What each version of the fused kernel was predicted to take against the product, and what it took."""
    lengths = ("64", "256", "1024")
    columns = [*(f"T = {length}" for length in lengths), "limit", *(f"measured, {length}" for length in lengths)]
    lines = [f"| version | tile, state on the chip | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for version in VERSIONS:
        measured = [
            [
                row["ratio"]
                for record in records
                for row in _rows(record, version.section)
                if row["T"] == length and row["sets"] == 1 and row["state"] == version.state
            ]
            for length in lengths
        ]
        cells = [f"{min(found):.1f}–{max(found):.1f}" if found else "not run" for found in measured]
        lines.append(
            f"| {version.name} | {version.tile} | {' | '.join(version.predicted)} | {version.limit} "
            f"| {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def gpu_linear(records: list[dict[str, Any]]) -> str:
    """Time of each kernel over that of the plain dW product, by shape, length and dtype of the state."""
    lines = [f"| device | shape | T | sets | state | {' | '.join(LINEAR.values())} |", "|---" * (5 + len(LINEAR)) + "|"]
    for record in records:
        found: dict[tuple, dict[str, float]] = {}
        for section in LINEAR:
            for row in _rows(record, section):
                key = (row["shape"], row["T"], row["sets"], row["state"])
                found.setdefault(key, {})[section] = row["ratio"]
        for key, ratios in found.items():
            cells = [f"{ratios[section]:.2f}" if section in ratios else "–" for section in LINEAR]
            lines.append(f"| {' | '.join([record['device']['name'], *map(str, key), *cells])} |")
    return "\n".join(lines)


def gpu_scores(records: list[dict[str, Any]]) -> str:
    """Tokens per second of `score` beside plain forward + backward."""
    lines = [
        "| device | model | backend | plain, tokens/s | score, tokens/s | score / plain | peak |",
        "|---" * 7 + "|",
    ]
    for record in records:
        for section, model in SCORES.items():
            for row in _rows(record, section):
                lines.append(
                    f"| {record['device']['name']} | {model} | {row['backend']} | {row['plain tokens/s']:,.0f} "
                    f"| {row['score tokens/s']:,.0f} | {row['speed']:.2f} | {row['peak GB']:.1f} GB |"
                )
    return "\n".join(lines)


def _rows(record: dict[str, Any], section: str) -> list[dict[str, Any]]:
    """Of a section that ran to its end, else none."""
    return record["sections"].get(section, {}).get("result", {}).get("rows", [])


def _run(record: dict[str, Any]) -> list[str]:
    """Processor, backend, threads, products and tokens of a run of `benchmarks.speed`."""
    backend = "kernels" if record["backend"] == "auto" else record["backend"]
    return [_processor(record), backend, str(record["machine"]["threads"]), _products(record), f"{record['tokens']:,}"]


def _processor(record: dict[str, Any]) -> str:
    maker = record["machine"]["cpu"].split("(")[0].split()[0]
    return f"{maker}, AMX" if record["machine"].get("amx") else maker


def _products(record: dict[str, Any]) -> str:
    dtype, precision = (record["settings"][name] for name in ("dtype", "precision"))
    return dtype if precision == "highest" else f"{dtype}, {precision!r}"


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _records(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    speeds = sorted(
        _records("speed_*.json"),
        key=lambda r: (
            r["machine"].get("amx", False),
            r["backend"] != "auto",
            r["settings"]["dtype"] != "float32",
            r["settings"]["precision"],
            -r["machine"]["threads"],
        ),
    )
    clipping = _records("fidelity_*.json")
    tables = {
        "fidelity": fidelity(sorted(clipping, key=lambda r: r["settings"]["warmup_max_grad_norm"] or 0)),
        "speed": speed(speeds),
        "once": once(speeds),
        "kernels": kernels(_records("kernels_*.json")),
        "products": products(_records("products_*.json")),
    }
    singles: dict[str, Callable[[dict[str, Any]], str]] = {
        "shapes_2t": shapes,
        "sampling": sampling,
        "memory": memory,
        "profile": profile,
        "architectures": architectures,
        "multimodal": architectures,
        "adapters": adapters,
    }
    for name, table_of in singles.items():
        records = _records(f"{name}.json")
        tables[name] = table_of(records[0]) if records else "Not run yet."
    on_gpus = _records("gpu_*.json")
    tables |= {"gpu_state": gpu_state(on_gpus), "gpu_versions": gpu_versions(on_gpus)}
    for name, table_of_all in {"gpu_linear": gpu_linear, "gpu_scores": gpu_scores}.items():
        tables[name] = table_of_all(on_gpus) if on_gpus else "No GPU has run it yet."
    pooled = results.pooled_effect("small")
    tables["effect"] = "Not run yet." if pooled is None else results.effect(pooled).strip()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, table in tables.items():
            block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
            text = re.sub(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
