"""K processes that share one GPU over gloo (or CPU processes) against the one-process pipeline, 20 batches."""

from __future__ import annotations

import os

import torch

from benchmarks.gpu import against
from benchmarks.speed.harness import Row

COLUMNS = against.COLUMNS


def run(small: bool, stages: int) -> list[Row]:
    """Also where there are several GPUs: only the first one is shown to the processes."""
    if torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    return against.compare(stages, small)
