"""An engine that records some of its batches, and clocks that are apart."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ibp_deepspeed import initialize
from ibp_deepspeed.comm.clocks import offset_to_first
from ibp_deepspeed.comm.link_groups import new_host_group
from ibp_deepspeed.errors import TraceError
from tests.toys import Layer, make_module, micro_batches
from tests.workers.failures import module_with

STAGES, COUNT, BATCHES, FIRST, LAST = 3, 3, 5, 3, 4
APART, ASLEEP = 1000.0, 0.03
"""Seconds between the clocks of two ranks, and of a forward pass of a slow layer."""


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Train ``BATCHES`` batches, with a trace or without; or see how far clocks are apart."""
    if "clocks" in case:
        rank = dist.get_rank()
        return {"offset": offset_to_first(new_host_group(), lambda: time.perf_counter() + APART * rank)}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": COUNT,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "interlocking": case["interlocking"],
    }
    layer = _Slow(9) if case.get("slow") else Layer(9)
    if case.get("follow"):
        module = make_module(STAGES, case["interlocking"], follow=True)
    else:
        module = module_with(layer, STAGES, at=2 * STAGES - 2)
    engine = initialize(model=module, config=config)[0]
    path, losses = case["path"], []
    if path:
        engine.trace_batches(FIRST, LAST, path)
    for batch in range(BATCHES):
        losses.append(engine.train_batch(iter(micro_batches(batch, COUNT))).item())
        if path and dist.get_rank() == 0:
            assert Path(path).exists() == (batch + 1 >= LAST), f"batch {batch + 1}"
    said = ""
    try:
        engine.trace_batches(BATCHES, BATCHES + 1, "nowhere")
    except TraceError as error:
        said = str(error)
    program = [(type(i).__name__, i.kwargs) for i in engine._schedule.program]
    engine.close()
    return {
        "losses": losses,
        "program": [(kind, named.get("micro_batch", -1), named.get("loss")) for kind, named in program],
        "said": said,
    }


class _Slow(Layer):
    """A layer that takes its time."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        time.sleep(ASLEEP)
        return super().forward(hidden)
