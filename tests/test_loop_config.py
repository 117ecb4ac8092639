"""Settings of a run: presets, files, overrides, and what is wrong with them in one line."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from montessori.cli import cli
from montessori.errors import ArgumentError
from montessori.loop.config import PRESETS, read_config, write_config

PAPER = ["teacher=a/b", "student=a/b", "data.seeds=s.jsonl", "data.reference=r.jsonl"]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_complete_and_round_trip(preset, tmp_path):
    config = read_config(preset=preset, assignments=PAPER if preset == "paper" else [])
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


def test_the_paper_preset_has_the_published_settings():
    config = read_config(preset="paper", assignments=PAPER)
    assert (config.generate.seed_examples, config.generate.own_examples, config.generate.samples_per_prompt) == (
        6,
        2,
        4,
    )
    sampling = config.generate.sampling
    assert (sampling.temperature, sampling.top_p, sampling.presence_penalty) == (1.0, 0.9, 1.0)
    assert (sampling.repetition_penalty, sampling.max_new_tokens) == (1.5, 1024)
    assert config.responses.sampling.temperature == 0.6
    assert (config.split.warmup, config.split.probe, config.split.final) == (1000, 10000, 10000)
    assert (config.warmup.learning_rate, config.warmup.batch_size, config.warmup.weight_decay) == (5e-6, 32, 0.0)
    assert config.data.reference_rows == 256
    assert (config.tune.beta, config.tune.learning_rate, config.tune.batch_size) == (0.1, 1e-6, 2)
    assert (config.tune.warmup_fraction, config.tune.decay_fraction, config.tune.min_learning_rate) == (0.1, 0.4, 1e-9)
    assert (config.train.learning_rate, config.train.batch_size) == (5e-6, 32)
    assert config.pairs.rule == "sign"


def test_a_file_goes_over_the_preset_and_assignments_over_both(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("tune:\n  beta: 0.5\n  learning_rate: 2e-6\nseed: 1\n")
    config = read_config(file, "demo", ["tune.beta=0.25", "warmup.max_grad_norm=null", "engine.batch_size=3"])
    assert (config.tune.beta, config.tune.learning_rate, config.seed) == (0.25, 2e-6, 1)
    assert config.engine.batch_size == 3 and config.warmup.max_grad_norm is None
    assert config.pairs.rule == "centred"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("pair.rule=sign", "unknown key 'pair': did you mean 'pairs'"),
        ("pairs.rulle=sign", "unknown key 'pairs.rulle': did you mean 'rule'"),
        ("generate.sampling.top_k=5", r"unknown key 'generate\.sampling\.top_k'"),
        ("pairs.rule=best", r"pairs\.rule: .*'centred'.* got 'best'"),
        ("tune.beta=strong", r"tune\.beta: .*number, got 'strong'"),
        ("tune.beta=.nan", r"tune\.beta"),
        ("seed=1.5", "seed: .*integer, got 1.5"),
        ("seed=-1", "seed: .*greater than or equal to 0, got -1"),
        ("seed=4294967296", "seed: .*less than 4294967296"),
        ("train={batch_size: 3, per_device_train_batch_size: 2}", "batch_size=3: expected a multiple of"),
        ("warmup={batch_size: 3, per_device_train_batch_size: 2}", "warmup: batch_size=3: expected a multiple of"),
        ("tune={learning_rate: 1e-6, min_learning_rate: 1e-3}", "min_learning_rate=0.001: expected at most"),
        ("train={warmup_fraction: 0.5, decay_fraction: 0.9}", "expected at most 1 together"),
        ("seed=true", "seed: .*integer, got True"),
        ("rounds=0", "rounds: .*greater than or equal to 1, got 0"),
        ("split.probe=2024-01-01", r"split\.probe: .*integer"),
        ("generate=3", "generate: "),
        ("generate.samples_per_prompt=1", r"generate\.samples_per_prompt=1: expected 2 or more"),
        ("optimise=response", r"responses\.samples=1: expected 2 or more"),
        ("responses.samples=2", r"responses\.samples=2: expected 1"),
        ("engine={name: endpoint, base_url: 'http://x', model: m}", "cannot be tuned"),
        ("engine.name=endpoint", r"expected engine\.base_url"),
        ("data.reference_rows=null", r"give data\.evaluation"),
        ("signal.kind=judge", r"expected judge\.model"),
        ("score.audit=1", r"score\.audit: audit of 1: expected at least 2"),
        ("score={method: exact, sample: 0.5}", "score: sample=0.5: method='exact' takes real steps"),
        ("score={batch_tokens: 128, max_length: 512}", "score: batch_tokens=128: expected at least max_length=512"),
        ("score.reference_dtype=model", "score: reference_dtype='model': method='anchored' takes steps"),
        ("novalue", "expected key=value"),
        ("tune.=1", "expected key=value"),
        ("tune.beta=[", "expected a YAML value"),
    ],
)
def test_wrong_settings_are_one_line(assignment, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        read_config(preset="demo", assignments=[assignment])
    assert "\n" not in str(caught.value)


def test_baselines_are_switches():
    config = read_config(
        preset="demo", assignments=["teacher_mode=untuned", "signal.kind=random", "tune.objective=sft"]
    )
    assert (config.teacher_mode, config.signal.kind, config.tune.objective) == ("untuned", "random", "sft")
    with pytest.raises(ArgumentError, match="teacher_mode=untuned"):
        read_config(preset="demo", assignments=["teacher_mode=untuned", "rounds=2"])


@pytest.mark.parametrize(
    "content",
    [
        "- a\n",
        "a: [\n",
        "!!python/object:os.system x\n",
        "tune: {beta: !!binary abc}\n",
        "tune: &own {beta: *own}\n",
        "seed: 1\nseed: 2\n",
        "tune: {beta: 0.1}\nseed: 1\ntune: {beta: 0.2}\n",
    ],
)
def test_a_file_that_is_no_config_is_one_line(content, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ArgumentError, match=r"bad\.yaml") as caught:
        read_config(file, "demo")
    assert "\n" not in str(caught.value)
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_config(tmp_path / "absent.yaml")


def test_a_run_without_a_config_says_what_can_be_given(tmp_path):
    for command in ("run", "generate", "pairs"):
        result = CliRunner().invoke(cli, [command, "--out", str(tmp_path / "new")])
        assert isinstance(result.exception, ArgumentError)
        assert str(result.exception).startswith("expected a CONFIG file or --preset (demo, small, paper), got neither")
    with pytest.raises(
        ArgumentError, match=r"--set without .* --preset \(demo, small, paper\): teacher: expected a value"
    ):
        read_config(assignments=["seed=1"])
    assert not list(tmp_path.iterdir())
