"""Optimizer state from checkpoints of DeepSpeed's ZeRO, by rank and group, against the live optimizer's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from process_support import run_in_two_processes
from state_support import UNEVEN, Exploit, assert_reads_as_live, make_adamw, refusal, take_steps, tiny_llama
from zero_files import deepspeed_classes, save_stage_2, save_stage_3

from montessori.checkpoints import read_state
from montessori.optim_state import AdamWState

RANK_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def trained(request):
    model = tiny_llama(**(UNEVEN | {"tie_word_embeddings": request.param}))
    optimizer = make_adamw(model)
    take_steps(model, optimizer)
    return model, optimizer


def edit(file: Path, change) -> None:
    with deepspeed_classes():
        saved = torch.load(file, weights_only=False)
        change(saved)
        torch.save(saved, file)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_stages_1_and_2(tmp_path, trained, ranks, padding):
    model, optimizer = trained
    directory = save_stage_2(tmp_path / "global_step2", model, optimizer, ranks, padding)
    assert_reads_as_live(directory, model, optimizer).validate(model)


@pytest.mark.parametrize("sub_group", [1000, 4, 1])
@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_stage_3(tmp_path, trained, ranks, sub_group):
    model, optimizer = trained
    directory = save_stage_3(tmp_path / "global_step2", model, optimizer, ranks, sub_group)
    assert_reads_as_live(directory, model, optimizer).validate(model)


def test_the_tag_that_latest_names_is_read(tmp_path, trained):
    model, optimizer = trained
    save_stage_2(tmp_path / "global_step2", model, optimizer)
    save_stage_3(tmp_path / "global_step1", *other_training())
    (tmp_path / "latest").write_text("global_step2\n")
    assert_reads_as_live(tmp_path, model, optimizer)
    for tag in (b"\xff\xfe", b"../global_step2", b"global_step3", b""):
        (tmp_path / "latest").write_bytes(tag)
        assert "latest: expected one of global_step1, global_step2, got" in refusal(tmp_path, model)


def other_training():
    model = tiny_llama(seed=1)
    optimizer = make_adamw(model)
    take_steps(model, optimizer)
    return model, optimizer


def test_options_of_deepspeeds_own_adam(tmp_path, trained):
    model, optimizer = trained
    directory = save_stage_3(tmp_path, model, optimizer)

    def as_fused(saved):
        for group in saved["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]:
            for key in set(group) - {"lr", "betas", "eps", "weight_decay", "params"}:
                del group[key]
            group["bias_correction"] = True

    for file in directory.glob("*_optim_states.pt"):
        edit(file, as_fused)
    assert_reads_as_live(directory, model, optimizer)

    def uncorrected(saved):
        for group in saved["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]:
            group["bias_correction"] = False

    edit(directory / f"bf16_{RANK_1.replace('1', '0', 1)}", uncorrected)
    assert "bias_correction=False is not supported" in refusal(directory, model)


def test_sub_groups_of_unknown_groups_are_refused(tmp_path):
    model = tiny_llama()
    layers = [list(layer.parameters()) for layer in model.model.layers]
    rest = [model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight]
    groups = [{"params": rest + layers[0], "lr": 1e-3}, {"params": layers[1], "lr": 1e-4}]
    optimizer = torch.optim.AdamW(groups)
    take_steps(model, optimizer)
    assert_reads_as_live(save_stage_3(tmp_path / "whole", model, optimizer), model, optimizer)
    message = refusal(save_stage_3(tmp_path / "cut", model, optimizer, sub_group=4), model)
    assert "the files do not say which in which" in message


def test_incomplete_checkpoints_are_refused(tmp_path, trained):
    model, optimizer = trained
    directory = save_stage_2(tmp_path, model, optimizer, ranks=3)
    (directory / "mp_rank_00_model_states.pt").rename(tmp_path / "away")
    assert "which name the parameters" in refusal(directory, model)
    (tmp_path / "away").rename(directory / "mp_rank_00_model_states.pt")
    (directory / RANK_1).rename(tmp_path / "gone")
    assert "expected the files of 3 ranks, got 2" in refusal(directory, model)
    (tmp_path / "gone").rename(directory / RANK_1.replace("mp_rank_00", "mp_rank_01"))
    assert "parallelism of DeepSpeed are not supported" in refusal(directory, model)


def test_another_layout_is_noticed(tmp_path, trained):
    model, optimizer = trained
    directory = save_stage_2(tmp_path / "two", model, optimizer, padding=3)

    def unaligned(saved):
        del saved["optimizer_state_dict"]["param_alignment_paddings"]

    for file in directory.glob("*_optim_states.pt"):
        edit(file, unaligned)
    assert "is not that of the model" in refusal(directory, model)

    directory = save_stage_3(tmp_path / "three", model, optimizer)

    def longer(saved):
        moments = saved["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]
        moments["exp_avg"] = torch.cat([moments["exp_avg"], torch.zeros(2)])

    for file in directory.glob("*_optim_states.pt"):
        edit(file, longer)
    assert "values of a rank" in refusal(directory, model)


@pytest.mark.parametrize("save", [save_stage_2, save_stage_3])
def test_exchanged_files_are_noticed(tmp_path, trained, save):
    model, optimizer = trained
    directory = save(tmp_path, model, optimizer)
    first, second = sorted(directory.glob("*_optim_states.pt"))
    first.rename(tmp_path / "away")
    second.rename(first)
    (tmp_path / "away").rename(second)
    assert "exchanged" in refusal(directory, model)


def test_weights_of_an_earlier_step_and_those_that_are_nowhere_are_taken(tmp_path, trained):
    model, optimizer = trained
    directory = save_stage_3(tmp_path, model, optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    assert_reads_as_live(directory, model, optimizer)
    with torch.device("meta"):
        nowhere = type(model)(model.config)
    assert read_state(directory, nowhere).keys() == dict(nowhere.named_parameters()).keys()


def test_nothing_in_the_files_runs(tmp_path, trained):
    model, optimizer = trained
    directory = save_stage_2(tmp_path / "saved", model, optimizer)
    torch.save({"optimizer_state_dict": Exploit(tmp_path / "ran")}, directory / RANK_1)
    assert "cannot be read as plain tensors" in refusal(directory, model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_deepspeed_saves_is_the_state_of_one_process(tmp_path, stage):
    pytest.importorskip("deepspeed")
    run_in_two_processes(Path(__file__).with_name("deepspeed_save.py"), stage, tmp_path)
    state, whole = read_state(tmp_path, tiny_llama(**UNEVEN)), AdamWState.load(tmp_path / "whole")
    assert list(state) == list(whole)
    for name, entry in whole.items():
        assert state[name].step == entry.step
        for label, moment in entry.tensors():
            # Three float32 steps apart, by the order of sums alone; a value in another's place would be far off.
            error = (getattr(state[name], label) - moment).norm() / moment.norm()
            assert error < 1e-5, (name, label)
