"""Optimizer state from directories of torch.distributed.checkpoint, as FSDP with sharded states leaves them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePosixPath

import distributed_save
import pytest
import torch
import torch.distributed.checkpoint as dcp
from process_support import run_in_two_processes
from state_support import (
    UNEVEN,
    Exploit,
    assert_reads_as_live,
    assert_same,
    make_adamw,
    refusal,
    take_steps,
    tiny_llama,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from montessori import sharded
from montessori.checkpoints import read_state
from montessori.optim_state import AdamWState

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@pytest.fixture
def trained():
    model = tiny_llama()
    optimizer = make_adamw(model)
    take_steps(model, optimizer)
    return model, optimizer


def save(directory: Path, saved: dict) -> Path:
    dcp.save(saved, storage_writer=dcp.FileSystemWriter(directory), no_dist=True)
    return directory


def test_two_ranks_of_fsdp(tmp_path):
    run_in_two_processes(distributed_save, tmp_path)
    assert len(list((tmp_path / "optimizer_0").glob("*.distcp"))) == 2
    model = tiny_llama(**UNEVEN)
    state = read_state(tmp_path, model)
    state.validate(model)
    # Both ranks see the same rows, and half the sum of two equal float32 numbers is exact.
    assert_same(state, AdamWState.load(tmp_path / "whole"))


@pytest.mark.parametrize("options", [None, FLAT], ids=["nested", "flat"])
@pytest.mark.parametrize("place", ["alone", "named", "beside a model"])
def test_saved_by_torch(tmp_path, trained, options, place):
    model, optimizer = trained
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    whole = {
        "alone": saved,
        "named": {"optimizer": saved},
        "beside a model": {"app": {"model": get_model_state_dict(model), "optim": saved}, "step": 3},
    }
    assert_reads_as_live(save(tmp_path / "saved", whole[place]), model, optimizer)


def test_a_frozen_parameter_is_not_asked_for(tmp_path, trained):
    model, optimizer = trained
    save(tmp_path / "optimizer_0", {"optimizer": get_optimizer_state_dict(model, optimizer)})
    model.model.norm.requires_grad_(False)
    assert "model.norm.weight" not in read_state(tmp_path, model)


def test_what_is_not_one_optimizer_is_refused(tmp_path, trained):
    model, optimizer = trained
    saved = get_optimizer_state_dict(model, optimizer)
    assert "got none" in refusal(save(tmp_path / "weights", {"model": get_model_state_dict(model)}), model)
    assert "got first, second" in refusal(save(tmp_path / "two", {"first": saved, "second": saved}), model)
    both = save(tmp_path / "both" / "optimizer_0", {"optimizer": saved}).parent
    torch.save(optimizer.state_dict(), both / "optimizer.pt")
    assert "expected one optimizer, got optimizer.pt, optimizer_0/.metadata" in refusal(both, model)
    assert "of another model" in refusal(save(tmp_path / "other", saved), tiny_llama(hidden_size=32))


def test_damaged_files_are_refused(tmp_path, trained):
    model, optimizer = trained
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    (pieces,) = save(tmp_path / "cut", saved).glob("*.distcp")
    pieces.write_bytes(pieces.read_bytes()[:3000])
    assert "cannot be read as plain tensors" in refusal(tmp_path / "cut", model)
    pieces.unlink()
    assert "cannot be read as plain tensors" in refusal(tmp_path / "cut", model)
    (tmp_path / "cut" / ".metadata").write_bytes(b"")
    assert "cannot be read as the index" in refusal(tmp_path / "cut", model)


def test_nothing_in_the_files_runs(tmp_path, trained):
    model, optimizer = trained
    directory = save(tmp_path / "saved", {"optimizer": get_optimizer_state_dict(model, optimizer)})
    index = pickle.loads((directory / ".metadata").read_bytes())
    (directory / ".metadata").write_bytes(pickle.dumps(Exploit(tmp_path / "ran")))
    assert "does not belong there" in refusal(directory, model)
    (pieces,) = directory.glob("*.distcp")
    with pieces.open("wb") as stream:
        torch.save(Exploit(tmp_path / "ran"), stream)
    for stored in index.storage_data.values():
        stored.offset, stored.length = 0, pieces.stat().st_size
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    assert "cannot be read as plain tensors" in refusal(directory, model)
    assert not (tmp_path / "ran").exists()


def test_no_file_outside_of_the_directory_is_read(tmp_path, trained):
    model, optimizer = trained
    directory = save(tmp_path / "saved", {"optimizer": get_optimizer_state_dict(model, optimizer)})
    index = pickle.loads((directory / ".metadata").read_bytes())
    for stored in index.storage_data.values():
        stored.relative_path = "../elsewhere"
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    (tmp_path / "elsewhere").write_bytes(b"")
    assert "outside of the checkpoint" in refusal(directory, model)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_of_any_python_are_read(module):
    """Python 3.13 has moved them, for readers and writers."""
    pickled = f"c{module}\nPosixPath\n(Va\nVb\ntR.".encode()
    assert sharded._Unpickler(io.BytesIO(pickled)).load() == PurePosixPath("a/b")
