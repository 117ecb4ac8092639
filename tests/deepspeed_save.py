"""What each process of the DeepSpeed test does: steps of a student under ZeRO, saved, and of a whole one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from state_support import UNEVEN, make_adamw, take_steps, tiny_llama, token_rows

from montessori.optim_state import AdamWState

STEPS = 3
SUB_GROUP = 3000  # parameters: smaller than the model, so that stage 3 cuts its groups


def main(stage: int, directory: Path) -> None:
    model = tiny_llama(**UNEVEN)
    zero = {"stage": stage} | ({"sub_group_size": SUB_GROUP} if stage == 3 else {})
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_adamw(model), config=config)
    for step in range(STEPS):
        row = torch.tensor([token_rows()[step]["input_ids"]])
        engine.backward(engine(input_ids=row, labels=row).loss)
        engine.step()
    engine.save_checkpoint(str(directory))
    if torch.distributed.get_rank() == 0:
        whole = tiny_llama(**UNEVEN)
        optimizer = make_adamw(whole)
        take_steps(whole, optimizer, STEPS)
        AdamWState.from_optimizer(whole, optimizer).save(directory / "whole")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
