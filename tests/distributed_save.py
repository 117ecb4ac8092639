"""What each process of the FSDP test does: steps of a sharded student, saved as accelerate does, and of a whole one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from state_support import UNEVEN, make_adamw, take_steps, tiny_llama
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from montessori.optim_state import AdamWState


def main(directory: str) -> None:
    processes = PartialState(cpu=True)
    model = tiny_llama(**UNEVEN)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = make_adamw(model)
    take_steps(model, optimizer)
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, storage_writer=dcp.FileSystemWriter(Path(directory) / "optimizer_0"))
    if processes.is_main_process:
        whole = tiny_llama(**UNEVEN)
        optimizer = make_adamw(whole)
        take_steps(whole, optimizer)
        AdamWState.from_optimizer(whole, optimizer).save(Path(directory) / "whole")
    processes.wait_for_everyone()
    processes.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
