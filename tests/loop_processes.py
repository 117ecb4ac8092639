"""What every process of the torchrun test does: warm up, score, tune and train on tiny models."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from montessori import processes
from montessori.data import load_rows
from montessori.loop import score, train, tune, warmup
from montessori.loop.score import ScoreSettings
from montessori.loop.train import TrainSettings
from montessori.loop.tune import TuneSettings
from montessori.loop.warmup import WarmupSettings


def work(student: str, folder: Path, out: Path) -> None:
    """`folder` holds pairs.jsonl, final.jsonl, reference.jsonl; every result lies below `out`.

    The number of examples at once is per process, so one process takes two turns where two share a step.
    """
    final, quiet = folder / "final.jsonl", {"seed": 0, "progress": False}
    batch = {"batch_size": 4, "per_device_train_batch_size": 2}
    warmup.run(WarmupSettings(learning_rate=1e-3, max_steps=2, **batch), student, final, out / "warmup", **quiet)
    checkpoint = warmup.checkpoint(out / "warmup")
    reference = load_rows(folder / "reference.jsonl")
    settings = ScoreSettings(batch_tokens=64, pilot=4)
    score.run(settings, checkpoint, final, reference, out / "score", progress=False)
    tune.run(TuneSettings(learning_rate=1e-3, **batch), student, folder / "pairs.jsonl", out / "tune", **quiet)
    train.run(TrainSettings(learning_rate=1e-3, **batch), student, final, out / "train", **quiet)


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes.start_processes()
    work(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    (Path(sys.argv[3]) / f"rank_{processes.rank()}_of_{processes.world_size()}").touch()
    torch.distributed.destroy_process_group()
