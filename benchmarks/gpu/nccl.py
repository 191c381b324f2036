"""NCCL between as many GPUs as there are stages, against the one-process pipeline, 20 batches."""

from __future__ import annotations

import torch

from benchmarks.gpu import against
from benchmarks.gpu.parts import NotRun
from benchmarks.speed.harness import Row

COLUMNS = against.COLUMNS


def run(small: bool, stages: int) -> list[Row]:
    """As in ``sharing``, with a GPU for each process, so that DeepSpeed takes NCCL."""
    there = torch.cuda.device_count()
    if there < stages:
        raise NotRun(f"not enough GPUs: {stages} needed, {there} there")
    return against.compare(stages, small)
