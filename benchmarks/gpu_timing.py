"""Time on the device for `benchmarks.gpu`."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def milliseconds(work: Callable[[], object], repeats: int = 12) -> float:
    """Median of single runs after three warm-ups."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
