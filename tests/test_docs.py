"""The Python of the README, of docs/pipelines.md and of docs/losses.md, as it stands there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from support import make_text_rows

from montessori import InfluenceEstimator
from montessori.loop.settings import settings_page

ROOT = Path(__file__).parents[1]


@pytest.fixture
def place(student, tmp_path, monkeypatch):
    """The working directory that the texts assume."""
    for seed, name in enumerate(("candidates", "reference")):
        rows = make_text_rows(16 if name == "candidates" else 4, seed=seed)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(student, tmp_path / "runs/warm/checkpoint-12")
    monkeypatch.chdir(tmp_path)


def run_python_of(page: str) -> dict:
    names: dict = {"__name__": page}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


def test_the_python_of_the_readme(place):
    assert run_python_of("README.md")["scores"].ok.all()


def test_the_python_of_the_recipes(place):
    names = run_python_of("docs/pipelines.md")
    influence, centred = names["scores"].influence, names["scores"].centred
    assert list(names["table"]["influence"]) == list(influence)
    np.testing.assert_array_equal(names["order"], np.argsort(-influence))
    assert len(names["helpful"]) == (centred > 0).sum()
    # One anchor, of other rows than those of the whole call.
    np.testing.assert_allclose(names["scored"]["influence"], influence, rtol=0.05, atol=0.05 * np.abs(influence).max())
    assert names["agreement"].spearman > 0.9
    assert names["first"].shape == names["second"].shape == (16,)
    assert not Path("scores.journal.jsonl").exists()
    before, after = names["callback"].history
    assert np.isfinite(before).all() and not np.array_equal(before, after)
    assert set(names["pairs"].column_names) == {"prompt", "chosen", "rejected"} and len(names["pairs"]) > 0
    assert names["delta"].shape == (3, 1)


@pytest.mark.filterwarnings("error::montessori.errors.FallbackWarning")
def test_the_python_of_losses(place):
    """Against real steps: the losses are those of the page."""
    names = run_python_of("docs/losses.md")
    for key, rows, loss in (
        ("by_worth", "worth", "weighted"),
        ("by_advantage", "written", "clipped_policy_gradient"),
        ("by_pair", "pairs", "dpo"),
        ("by_teacher", "candidates", "distilled"),
    ):
        exact = InfluenceEstimator(
            names["model"], "runs/warm/checkpoint-12", method="exact", loss_fn=names[loss], **names["settings"]
        )
        want, got = exact.score(names[rows]).influence, names[key]
        assert len(got) == len(names[rows]) and np.isfinite(got).all()
        np.testing.assert_allclose(got, want, rtol=0, atol=0.05 * np.ptp(want))


def test_the_page_of_settings_is_the_one_that_the_command_prints():
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == settings_page()


def test_the_page_of_settings_has_every_key_with_its_default():
    page = settings_page()
    values = yaml.safe_load((ROOT / "montessori/loop/small.yaml").read_text(encoding="utf-8"))
    keys = re.findall(r"^\| `([\w.]+)` \|.*small: ", page, re.M)

    def at(values: dict, key: str):
        for part in key.split("."):
            values = values[part]
        return values

    assert len(keys) > 20 and all(at(values, key) is not None for key in keys)
    assert "| `engine.api_key_env` | text or null | `null` |  |" in page
    assert "| `judge.engine.retries` | whole number, ≥ 0 | `5` |  |" in page
    assert "| `evaluate.answers.sampling.temperature` | number, ≥ 0 | `0.0` |  |" in page
