"""Train the same case with weight gradients at once and put off; are the parameters the same bits?"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from ibp_deepspeed.engine.engine import InterlockedPipelineEngine
from tests.toys import micro_batches
from tests.workers.parity import DTYPES, make_engine


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    whole, _ = train(case, "fused")
    apart, put_off = train(case, "split")
    return {"equal": all(map(torch.equal, whole, apart)), "put off": put_off}


def train(case: dict[str, Any], backward: str) -> tuple[list[torch.Tensor], int]:
    """Parameters after five steps, and how many weight gradients were put off."""
    case = {**case, "interlocking": {**case["interlocking"], "backward": backward}}
    dtype = DTYPES[case["dtype"]]
    engine = make_engine(case, case["stages"], case["micro_batches"], dtype, True, 1)
    count, work_off = 0, InterlockedPipelineEngine._work_off

    def counting(self: Any, until: Any) -> None:
        nonlocal count
        count += len(self._due[0].weight_gradients)
        work_off(self, until)

    with mock.patch.object(InterlockedPipelineEngine, "_work_off", counting):
        for step in range(5):
            engine.train_batch(iter(micro_batches(step, case["micro_batches"], dtype)))
    parameters = [p.detach().clone() for p in engine.module.parameters()]
    engine.close()
    return parameters, count
