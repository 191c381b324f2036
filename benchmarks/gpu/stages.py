"""The profile of a stage: pieces of a micro-batch, eager and compiled: time, MFU, head against stage, peak memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.memory import estimated_peak
from benchmarks.speed.cases import profile
from benchmarks.speed.cases.profile import Stage
from benchmarks.speed.harness import Row

COLUMNS: dict[str, Callable[[Row], str]] = {
    **profile.COLUMNS,
    "head / stage": lambda row: f"{row['head_share']:.2f}",
    "estimated MiB": lambda row: f"{row['estimated_bytes'] / 2**20:,.0f}",
}
LAYERS, BATCH, TOKENS = 3, 4, 2048


def run(small: bool, shape: str) -> list[Row]:
    """Eager, then compiled."""
    gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    layers, batch, tokens = (2, 1, 64) if small else (LAYERS, BATCH, TOKENS)
    rows = []
    for compiled in (False, True):
        stage = Stage.make(shape, layers, batch, tokens, device, dtype, compiled)
        row = {"contender": shape, "compiled": compiled, **profile.measure(stage, 3 if small else 10)}
        rows.append({**row, "head_share": _head_share(row), "estimated_bytes": estimated_peak(stage)})
        del stage  # its memory is not the next one's
    return rows


def _head_share(row: Row) -> float:
    """Time of a head divided by that of the stage's own forward and backward pass."""
    milliseconds = {piece: spread[0] for piece, spread in row["ms"].items()}
    return round(milliseconds["head"] / (milliseconds["forward"] + milliseconds["backward"]), 3)
