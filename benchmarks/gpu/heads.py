"""One head, forward and backward: our chunks and Liger-Kernel's fused cross-entropy against full logits."""

from __future__ import annotations

from argparse import Namespace

import torch

from benchmarks.speed.cases import heads
from benchmarks.speed.harness import Row
from ibp_deepspeed.objectives import fused_cross_entropy

COLUMNS = heads.COLUMNS
SAME = ("chunks", "fused", "shared")  # beginnings of the contenders that compute the same as full logits
TOLERANCE = 1e-3  # relative; all round logits to bf16 once


def run(small: bool) -> list[Row]:
    """The vocabularies of Llama 2 and 3 on 4096 tokens of width 4096."""
    sizes = {"vocabularies": [600], "tokens": 64, "width": 16}
    rows = heads.run(
        Namespace(**sizes if small else {"vocabularies": [32_000, 128_256], "tokens": 4096, "width": 4096}, repeats=5)
    )
    for row in rows:
        expected = next(r["loss"] for r in rows if r["contender"] == "naive" and r["vocabulary"] == row["vocabulary"])
        if row["contender"].startswith(SAME) and not abs(row["loss"] - expected) <= TOLERANCE * expected:
            row["failed"] = f"{row['contender']}: a loss of {row['loss']:.5f} where full logits give {expected:.5f}"
    if not any(row["contender"] == "fused kernel" for row in rows):
        rows.append({"contender": "fused kernel", "not_run": _why_not_fused()})
    return rows


def _why_not_fused() -> str:
    if not torch.cuda.is_available():
        return "there is no GPU"
    return "Liger-Kernel is not installed" if fused_cross_entropy.kernel() is None else "it does not apply"
