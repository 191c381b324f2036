"""Train the same case with weight gradients at once and put off; are the parameters the same bits?"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from ibp_deepspeed.engine.engine import InterlockedPipelineEngine
from tests.toys import micro_batches
from tests.workers.parity import DTYPES, make_engine


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    whole, _, _ = train(case, "fused")
    apart, put_off, early = train(case, "split")
    return {"equal": all(map(torch.equal, whole, apart)), "put off": put_off, "early": early}


def train(case: dict[str, Any], backward: str) -> tuple[list[torch.Tensor], int, int]:
    """Parameters after five steps, how many weight gradients were put off, and how often a gap was filled with some."""
    case = {**case, "interlocking": {**case["interlocking"], "backward": backward}}
    dtype = DTYPES[case["dtype"]]
    engine = make_engine(case, case["stages"], case["micro_batches"], dtype, True, 1)
    count, early, in_gap = 0, 0, False
    work_off, fill = InterlockedPipelineEngine._work_off, InterlockedPipelineEngine._fill_the_gap

    def counting(self: Any, until: Any) -> None:
        nonlocal count, early
        before = len(self._due[0].weight_gradients)
        early += in_gap
        micro = self._due[0]
        work_off(self, until)
        count += before - len(micro.weight_gradients)

    def filling(self: Any, has_come: Any) -> None:
        nonlocal in_gap
        in_gap = True
        fill(self, has_come)
        in_gap = False

    with (
        mock.patch.object(InterlockedPipelineEngine, "_work_off", counting),
        mock.patch.object(InterlockedPipelineEngine, "_fill_the_gap", filling),
    ):
        for step in range(5):
            engine.train_batch(iter(micro_batches(step, case["micro_batches"], dtype)))
    parameters = [p.detach().clone() for p in engine.module.parameters()]
    engine.close()
    return parameters, count, early
