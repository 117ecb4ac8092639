"""The arithmetic behind the tables of benchmarks/RESULTS.md."""

import argparse
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from support import make_model, make_rows, slow_influence, warm_optimizer

from benchmarks import effect, naive, render, results, truth
from benchmarks.peers import __main__ as peers_run
from benchmarks.peers.entries import ENTRIES
from benchmarks.peers.less import AdamDot
from benchmarks.peers.montessori_peer import FirstOrder, Montessori, RealStep
from benchmarks.peers.task import Task, exact_adam_scores, mean_losses, reference_gradient
from benchmarks.peers.vmap import ExactAdam
from montessori import AdamWState, AdamWStep, reference
from montessori.batching import Example, collate
from montessori.errors import ArgumentError
from montessori.losses import response_loss
from montessori.optim_state import ParameterState


def make_task(batch_size=3):
    model = make_model("llama_tied")
    optimizer = warm_optimizer(model, weight_decay=0.0)
    rows = [make_rows(5, seed=1), make_rows(3, seed=2)]
    examples = [
        sorted(
            (Example(torch.tensor(r["input_ids"]), torch.tensor(r["labels"]), i) for i, r in enumerate(part)),
            key=lambda example: -example.num_tokens,
        )
        for part in rows
    ]
    state = AdamWState.from_optimizer(model, optimizer)
    return Task(model, optimizer, state, *examples, batch_size)


def listed(examples):
    return [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples]


def scores_of(make_peer, task):
    peer = make_peer(task)
    peer.prepare()
    return peer.score()


def test_losses_of_peers_are_those_of_the_package():
    task = make_task()
    batch = collate(task.candidates)
    ours = response_loss(task.model, batch)
    theirs = mean_losses(task.model, batch.input_ids, batch.attention_mask, batch.labels)
    torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=0)


def test_whole_gradient_peer_and_ours_agree_with_the_definition():
    task = make_task()
    truth_values = slow_influence(
        task.model, task.optimizer, listed(task.candidates), listed(task.references), "first_order"
    )
    # The eager attention that vmap needs takes its softmax in float32.
    assert scores_of(ExactAdam, make_task()) == pytest.approx(truth_values, rel=1e-5)
    assert scores_of(FirstOrder, make_task()) == pytest.approx(truth_values, rel=1e-9)


def test_real_step_is_the_definition():
    task = make_task()
    truth_values = slow_influence(task.model, task.optimizer, listed(task.candidates), listed(task.references), "exact")
    assert scores_of(RealStep, task) == pytest.approx(truth_values, rel=1e-7)


def test_less_ranks_as_its_formula_and_is_not_the_exact_update():
    less, exact = scores_of(AdamDot, make_task()), scores_of(FirstOrder, make_task())
    ratio = less / exact
    assert np.all(np.isfinite(less)) and ratio.std() > 1e-3 * abs(ratio.mean())


def test_exact_adam_of_a_batch_is_the_reference_update_one_by_one():
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3, 2), (3, 2), (3, 2), (3, 2))
    grads, exp_avg, param, q = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
    exp_avg_sq = exp_avg**2 + 0.1
    step = AdamWStep(lr=1e-3, weight_decay=0.1, step=7)
    state = AdamWState({"w": ParameterState(step, exp_avg, exp_avg_sq)})
    expected = [-(q * reference.adamw_delta(g, exp_avg, exp_avg_sq, param, step)).sum() for g in grads]
    scores = exact_adam_scores(state, "w", grads, param, q)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-12, atol=0)


def test_frozen_v_is_the_linear_part_of_the_update():
    step = AdamWStep(lr=1e-3, beta2=0.999, step=9)
    exp_avg, exp_avg_sq, param = (torch.tensor([value], dtype=torch.float64) for value in (0.3, 0.2, 1.0))
    grads = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    at = [truth.frozen_v(grad, exp_avg, exp_avg_sq, param, step) for grad in grads]
    assert float(at[2] - at[1]) == pytest.approx(float(at[1] - at[0]), rel=1e-12)
    exact = -reference.adamw_delta(torch.zeros(1, dtype=torch.float64), exp_avg, exp_avg_sq, param, step)
    # At g = 0 the exact v' is β2 v over its own bias correction.
    correction = (1 - step.beta2 ** (step.step - 1)) / (1 - step.beta2**step.step) * step.beta2
    assert float(at[0]) == pytest.approx(float(exact) * correction**0.5, rel=1e-6)


def test_cost_model_recovers_the_costs_that_made_the_points():
    sizes = [naive.Size(n, r, 100.0 * n, 200.0 * r) for n, r in ((2, 6), (2, 6), (4, 6))]
    phases = ["references", "loop", "loop"]
    seconds = [0.01 * 1200] + [1.5 * s.n + 0.01 * (s.n + 1) * s.reference_tokens for s in sizes[1:]]
    coefficients, error = naive.fit("optimised", phases, sizes, seconds)
    assert coefficients == pytest.approx([1.5, 0.01])
    assert error < 1e-9
    _, worse = naive.fit("optimised", phases, sizes, [seconds[0], seconds[1] * 2, seconds[2]])
    assert worse > 0.1


def test_cold_runs_are_not_fitted():
    cost = {"optimised": [1.5, 0.01], "published": [9.0, 1.0], "montessori": [18.0, 0.006, 0.006]}
    measured = []
    for method, points in naive.MEASURED.items():
        for number, (phase, n, r) in enumerate(points):
            size = naive.Size(n, r, 100.0 * n, 130.0 * r)
            seconds = float(np.dot(naive.PHASES[method][phase](size), cost[method]))
            cold = number < naive.COLD[method]
            measured.append({"method": method, "phase": phase, "seconds": seconds * (3 if cold else 1), "cold": cold})
            measured[-1] |= asdict(size)
    found = naive.extrapolate(measured, [naive.Size(1000, 256, 100_000.0, 33_280.0)])
    assert max(found["fit_error"].values()) < 1e-9
    assert found["modelled"][0]["optimised"] == pytest.approx(1.5 * 1000 + 0.01 * 1001 * 33_280)


def test_a_whole_run_costs_its_loop_or_the_sum_of_its_phases():
    size = naive.Size(10, 4, 1000.0, 800.0)
    assert naive.whole("optimised", size) == [10, 11 * 800.0]
    assert naive.whole("montessori", size) == [1, 800.0, 1000.0]


def test_size_beyond_the_examples_takes_their_mean_length():
    examples = [Example(torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64), n) for n in (4, 8)]
    size = naive.size_of(10, 1, examples, examples)
    assert (size.candidate_tokens, size.reference_tokens) == (60.0, 4.0)


def test_a_shortened_candidate_keeps_labels_and_a_short_one_is_whole():
    ids = torch.arange(40)
    labels = torch.where(ids < 30, -100, ids)
    long, short = Example(ids, labels, 0), Example(ids[25:35], labels[25:35], 1)
    cut = truth.cut([long, short], 16)
    assert [example.num_tokens for example in cut] == [16, 10]
    assert cut[0].num_label_tokens == 8
    assert torch.equal(cut[1].input_ids, short.input_ids)


def peer_result(name, score, prepare, extra, pearson=0.9):
    return {
        "name": name,
        "score": "s",
        "seconds": {"plain": [1.0, 1.0], "score": [score, score], "prepare": prepare, "cold": 1.0},
        "peak_rss_bytes": {"plain": 10**9, "score": 10**9 + extra},
        "over_references": False,
        "same_units": False,
        "trainable": 100,
        "left_out": {"norms": 25},
        "agreement": {"pearson": pearson, "spearman": 0.5, "sign_agreement": 1.0, "num_examples": 8},
    }


def test_a_peer_that_does_better_is_listed_and_one_that_does_not_is_not():
    ours = peer_result("montessori", 1.0, 5.0, 0)
    peers = [peer_result("fast", 0.5, 9.0, 10**9), peer_result("slow", 2.0, 9.0, 10**9, pearson=0.8)]
    text = results.not_ahead({"peers": [ours, *peers], "settings": {"model": "tiny"}})
    assert "fast 0.50" in text
    assert "slow" not in text


def test_a_peer_that_failed_keeps_its_row_with_the_reason():
    failed = {"name": "bergson, raw", "score": "s", "error": "ModuleNotFoundError: no bergson"}
    text = results.peers({"peers": [failed, peer_result("montessori", 1, 1, 0)]})
    assert "not run: ModuleNotFoundError: no bergson" in text
    assert all(f"| {name} |" in text for name in ENTRIES)
    rows = [line.count("|") for line in text.splitlines()]
    assert len(set(rows)) == 1
    assert "| 75% | norms" in text


@pytest.mark.parametrize(
    "changed", [{}, {"threads": 1}, {"candidates": "others.jsonl"}, {"examples": "others"}], ids=str
)
def test_rows_of_a_last_run_are_kept_where_it_had_the_same_examples_and_settings(changed, tmp_path, monkeypatch):
    monkeypatch.setattr(peers_run, "RESULTS", tmp_path)
    given = {"candidates": "data/rows.jsonl", "model": "tiny", "threads": 2, "num_candidates": 8}
    given |= {"warmup_batch_size": 8, "warmup_max_grad_norm": None}
    record = {"settings": given | {"candidates": "rows.jsonl"}, "examples": "these"}
    record["peers"] = [{"name": "LESS-style, one by one", "scores": [1.0]}]
    (tmp_path / "peers_tiny.json").write_text(json.dumps(record), encoding="utf-8")
    arguments = argparse.Namespace(**given | {name: changed[name] for name in changed.keys() & given.keys()})
    kept = peers_run.last_results(arguments, changed.get("examples", "these"))
    assert kept == ({} if changed else {"LESS-style, one by one": {"scores": [1.0]}})


def test_reference_gradient_is_that_of_the_mean_of_means():
    task = make_task(batch_size=2)
    names = set(task.trainable)
    whole = reference_gradient(task, names)
    task.batch_size = 3
    for name, value in reference_gradient(task, names).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-15)


def test_default_and_first_order_cover_all_parameters():
    task = make_task()
    assert Montessori(task).covered == set(task.trainable)


def test_stages_of_a_round_have_their_share_of_the_whole():
    stages = [
        {"stage": "generate", "seconds": 30.0, "tokens": 1000},
        {"stage": "score", "seconds": 10.0, "tokens": 500},
    ]
    text = results.loop({"stages": stages})
    assert "| generate | 30 s | 75% | 1,000 |" in text
    assert "| score | 10 s | 25% | 500 |" in text
    assert "| all | 40 s | 100% |  |" in text


def effect_of_seed(lift, p, below):
    rng = np.random.default_rng(int(1e4 * p))
    untuned, losses = rng.normal(size=50), rng.normal(size=20) + 3
    return {
        "influence": {"tuned": (untuned + lift).tolist(), "untuned": untuned.tolist()},
        "difference": lift,
        "p": p,
        "held_out": {"tuned": (losses - below).tolist(), "untuned": losses.tolist(), "base": losses.tolist()},
        "num_pairs": 7,
        "validation_accuracy": None,
        "seconds": {"round_1/generate": 60.0, "round_1/score": 20.0, "round_1/tune": 20.0, "round_1/evaluate": 900.0},
    }


def test_seeds_of_an_effect_are_pooled_without_mixing_their_values():
    seeds = [effect_of_seed(0.5, 0.04, 0.01), effect_of_seed(1.5, 0.03, 0.03)]
    overall = effect.summarise(seeds)
    assert overall["difference"]["mean"] == pytest.approx(1.0)
    assert overall["difference"]["low"] < 1.0 < overall["difference"]["high"]
    # Two weak results that agree are stronger together.
    assert overall["p"] < 0.03
    assert overall["below_self_instruct"]["mean"] == pytest.approx(0.02)
    assert overall["share_of_scoring"] == pytest.approx(0.2)


def write_seed(folder, seed, assignments=("data.evaluation_rows=128",), name=None):
    settings = {"preset": "small", "name": name, "seeds": [seed], "assignments": list(assignments)}
    machine = {"cpu": f"maker {seed}", "versions": {"torch": "2", "transformers": "5"}}
    record = {"settings": settings, "machine": machine, **effect_of_seed(0.5 * seed, 0.01 * seed, 0.01)}
    (folder / f"effect_{name or 'small'}_{seed}.json").write_text(json.dumps(record), encoding="utf-8")


def test_seeds_from_several_machines_are_pooled_in_the_order_of_their_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert results.pooled_effect("small") is None
    for seed in (10, 2):
        write_seed(tmp_path, seed)
    text = "\n".join(results.render_section(results.pooled_effect("small"), "Title", "effect", results.effect))
    assert text.index("| 2 |") < text.index("| 10 |")
    assert "influence +3.00e+00" in text and "one-sided p = 0.0" in text
    assert "maker 2, torch 2, transformers 5; maker 10, torch 2, transformers 5." in text
    assert "--preset small --seeds 2 10 --set data.evaluation_rows=128" in text


def test_a_named_variation_of_a_preset_has_seeds_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    write_seed(tmp_path, 1)
    write_seed(tmp_path, 2, assignments=["tune.beta=0.2"], name="strong")
    named = results.pooled_effect("strong")
    assert named["settings"]["seeds"] == [2] and results.pooled_effect("small")["settings"]["seeds"] == [1]
    assert "--preset small --name strong --seeds 2 --set tune.beta=0.2" in results.setting(named, "effect")


def test_seeds_of_different_settings_are_not_pooled(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    write_seed(tmp_path, 1)
    write_seed(tmp_path, 2, assignments=["data.evaluation_rows=64"])
    with pytest.raises(ArgumentError, match=r"data.evaluation_rows=128.*seed 2 too.*data.evaluation_rows=64"):
        results.pooled_effect("small")


def test_tables_of_a_gpu_have_what_ran_and_dashes_for_the_rest():
    linear = {"shape": "q", "T": "256", "sets": 1, "state": "float32", "ratio": 1.234}
    score = {"backend": "triton", "plain tokens/s": 1000.0, "score tokens/s": 900.0, "speed": 0.9, "peak GB": 4.0}
    sections = {
        "linear wgmma": {"seconds": 1.0, "result": {"rows": [linear]}},
        "linear mma": {"seconds": 1.0, "error": "took more than 60 s"},
        "score triton": {"seconds": 1.0, "result": {"rows": [score]}},
    }
    records = [
        {"device": {"name": "card"}, "machine": {"versions": {"torch": "3", "triton": "4"}}, "sections": sections}
    ]
    assert "card (torch 3, triton 4; did not end well: linear mma)" in render.gpu_state(records)
    assert "| shared memory; at T = 64 the map | not run | not run | not run |" in render.gpu_versions(records)
    versions = [line for line in render.gpu_versions(records).splitlines() if "1.2–1.2" in line]
    assert versions == [
        "| CUDA `wgmma` | 64 × 128, float32 in shared memory | 5.2 | 3.4 | 3.4 | L2 | not run | 1.2–1.2 | not run |"
    ]
    assert render.gpu_linear(records).splitlines()[2:] == ["| card | q | 256 | 1 | float32 | – | 1.23 | – | – | – |"]
    assert render.gpu_scores(records).splitlines()[2:] == [
        "| card | TinyLlama-1.1B | triton | 1,000 | 900 | 0.90 | 4.0 GB |"
    ]
