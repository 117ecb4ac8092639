from __future__ import annotations

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from loop_support import make_generated
from test_loop_pairs import make_scores

from montessori.cli import cli
from montessori.errors import ArgumentError, DataError, ResourceError
from montessori.loop import report
from montessori.writing import write_json, write_jsonl

COSTS = {
    "round_1/generate": {"seconds": 30.0, "tokens": 3000, "started": 1.0},
    "round_1/score": {"seconds": 10.0, "tokens": 0, "started": 2.0},
}
INTERVAL = {"mean": 0.25, "low": 0.1, "high": 0.4, "n": 8}


@pytest.fixture
def finished(tmp_path):
    """A run whose stages have all written their files."""
    folder = tmp_path / "run" / "round_1"
    rows = make_generated(2)
    rows[3]["completion"] = "<script>alert('x')</script>"
    write_jsonl(folder / "generate" / "probe.jsonl", rows)
    make_scores(np.array([0.1, 0.2, np.nan, 0.9, 0.3, -0.7, 0.4, 0.0]), np.ones(8)).save(
        folder / "score" / "scores.parquet"
    )
    write_json(
        folder / "pairs" / "summary.json",
        {
            "num_valued": 7, "num_pairs": 5, "prompts_without_pairs": 1, "num_prompts": 2,
            "prompts_by_num_pairs": {"0": 1, "5": 1},
            "sign": {"positive": 5, "negative": 1, "zero": 1},
            "sign_centred": {"positive": 1, "negative": 6, "zero": 0},
        },
    )  # fmt: skip
    write_json(folder / "tune" / "summary.json", {"num_pairs": 4})
    steps = [
        {"step": n, "loss": 0.7 - n / 100, "rewards/margins": n / 10, "rewards/accuracies": 0.5} for n in (1, 2, 3)
    ]
    held_out = {"step": 3, "eval_loss": 0.6, "eval_rewards/margins": 0.2, "eval_rewards/accuracies": 0.75}
    write_jsonl(folder / "tune" / "metrics.jsonl", [*steps, held_out])
    write_jsonl(folder / "train" / "metrics.jsonl", steps)
    write_json(
        folder / "evaluate" / "evaluation.json",
        {
            "held_out": {"models": {"student": {"loss": INTERVAL}}, "below": {"base": INTERVAL}},
            "influence": {
                "tuned": {"mean": INTERVAL, "influence": [0.2, 0.3, None]},
                "untuned": {"mean": INTERVAL, "influence": [0.1, 0.2, 0.15]},
                "comparison": {"difference": INTERVAL, "p": 0.0123},
            },
            "win_rate": {"base": {"win_rate": INTERVAL, "length_controlled": 0.61}},
        },
    )
    return tmp_path / "run"


def test_the_report_is_one_page_with_pictures_beside_it(finished):
    page = report.run(finished, COSTS).read_text(encoding="utf-8")
    pictures = sorted(path.name for path in finished.glob("*.png"))
    assert pictures == [
        "round_1_influence.png",
        "round_1_margins_of_dpo.png",
        "round_1_pairs_per_prompt.png",
        "round_1_training_losses.png",
    ]
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', page)
    assert sources == ["data:image/png;base64,"] * 4
    assert (finished / pictures[0]).read_bytes().startswith(b"\x89PNG")


def test_the_extremes_stand_as_the_teacher_wrote_them_and_cannot_run(finished):
    page = report.run(finished, COSTS).read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;alert(" in page
    highest, lowest = (page.index(f"<h3>{name} influence</h3>") for name in ("highest", "lowest"))
    assert highest < page.index("r1-000000-3") < page.index("r1-000001-2") < lowest
    assert lowest < page.index("r1-000001-1", lowest) < page.index("r1-000001-3", lowest)
    # The candidate without a score is not among them.
    assert "r1-000000-2" not in page


def test_a_tuned_answer_stands_below_what_it_answers(finished):
    rows = [{**row, "completion": row["response"]} for row in make_generated(2)]
    write_jsonl(finished / "round_1/generate/probe.jsonl", rows)
    page = report.run(finished, COSTS).read_text(encoding="utf-8")
    best = rows[3]
    assert f'<pre>{best["instruction"]}</pre><pre class="note">{best["response"]}</pre>' in page


def test_the_numbers_of_the_round_and_the_costs(finished):
    page = report.run(finished, COSTS).read_text(encoding="utf-8")
    numbers = dict(report.headline(finished))
    assert numbers["preference pairs"] == "5"
    assert numbers["validation pairs in the right order"] == "75%"
    assert numbers["tuned teacher above untuned teacher by"].endswith("one-sided p = 0.0123")
    assert numbers["win rate against base, length-controlled"] == "61.0%"
    assert all(name in page for name in numbers)
    assert report.cost_rows(COSTS) == [
        ["round_1/generate", "30.0", "75%", "3,000", "100"],
        ["round_1/score", "10.0", "25%", "", ""],
        ["all", "40.0", "100%", "", ""],
    ]


def test_the_same_run_gives_the_same_page(finished):
    first = report.run(finished, COSTS).read_bytes()
    assert report.run(finished, COSTS).read_bytes() == first


def test_what_is_missing_from_the_numbers_is_told(finished):
    path = finished / "round_1/evaluate/evaluation.json"
    evaluation = json.loads(path.read_text(encoding="utf-8"))
    nothing = {"mean": None, "rows": [], "influence": [], "drift": None}
    evaluation["influence"] = {"tuned": nothing, "untuned": {**nothing, "rows": [1], "influence": [None]}}
    evaluation["win_rate"]["base"]["unread"] = 7
    write_json(path, evaluation)
    agreement = {"pearson": 0.99987, "sign_agreement": 0.875, "num_examples": 8}
    write_json(finished / "round_1/score/audit.json", {"agreement": {"reference": agreement}})
    report.run(finished, COSTS)
    numbers = dict(report.headline(finished))
    assert numbers["real influence, tuned teacher"] == "no row can be scored"
    assert numbers["verdicts against base that the judge did not give"] == "7"
    told = numbers["predicted against real influence, reference"]
    assert told == "Pearson 0.9999, signs alike 88%, n = 8"


def test_a_damaged_file_is_named(finished):
    path = finished / "round_1/evaluate/evaluation.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"evaluation\.json: cannot be read .*redo the stage"):
        report.run(finished, COSTS)


def test_a_run_cut_short_is_reported_as_far_as_it_came(finished):
    for name in ("evaluation.json", "metrics.jsonl", "summary.json", "scores.parquet"):
        for path in finished.rglob(name):
            path.unlink()
    assert "round 1" in report.run(finished, {}).read_text(encoding="utf-8")
    assert report.headline(finished) == []


def test_later_rounds_follow_in_order_and_the_last_gives_the_headline(finished):
    for number, pairs in ((2, 20), (10, 100)):
        summary = json.loads((finished / "round_1" / "pairs" / "summary.json").read_text())
        write_json(finished / f"round_{number}" / "pairs" / "summary.json", {**summary, "num_pairs": pairs})
    page = report.run(finished, {}).read_text(encoding="utf-8")
    assert page.index("round 1<") < page.index("round 2<") < page.index("round 10<")
    assert dict(report.headline(finished))["preference pairs"] == "100"


def test_a_directory_without_a_run_and_one_that_cannot_be_written(finished, tmp_path):
    with pytest.raises(ArgumentError, match="expected the directory of a run"):
        report.run(tmp_path, {})
    (finished / "report.html").mkdir()
    with pytest.raises(ResourceError, match=r"report\.html: cannot be written"):
        report.run(finished, {})


def test_the_command_writes_the_report_and_prints_its_numbers(finished):
    write_json(finished / "round_1" / "score" / "cost.json", COSTS["round_1/score"])
    result = CliRunner().invoke(cli, ["report", str(finished)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "preference pairs: 5" in result.output and "round_1/score" in result.output
    assert (finished / "report.html").is_file()


@pytest.mark.parametrize(("stage", "missing"), [("pairs", "score"), ("tune", "pairs"), ("train", "regenerate")])
def test_a_stage_without_the_one_before_it_says_which_to_run(stage, missing, tmp_path):
    with pytest.raises(ArgumentError, match=rf"round_1/{missing}: expected a finished stage; run it first"):
        CliRunner().invoke(cli, [stage, "--preset", "demo", "--out", str(tmp_path), "--quiet"], catch_exceptions=False)
