"""Whether a stage sees that a message has come, before it asks for it."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from ibp_deepspeed.comm.message import TensorSpec
from tests.toys import WIDTH, micro_batches
from tests.workers.parity import make_engine

_PATIENCE = 20.0


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """After a batch, which fixes the shape, the first stage sends one activation more."""
    engine = make_engine({"interlocking": {"strategy": "local"}}, 2, 1, torch.float32, True, 1)
    engine.train_batch(iter(micro_batches(0, 1)))
    links, hidden, seen = engine.links, torch.arange(4.0 * WIDTH).view(4, WIDTH), {}
    if engine.stage_id == 1:
        seen["before"] = links.has_activation()
    dist.barrier()
    if engine.stage_id == 0:
        links.send_activation(TensorSpec.of(hidden, 0), hidden, (7, 3, 5))
    else:
        until = time.monotonic() + _PATIENCE
        while not links.has_activation() and time.monotonic() < until:
            time.sleep(0.001)
        seen["there"] = links.has_activation()
        payload, seen["header"] = links.receive_activation()
        seen["same"], seen["after"] = torch.equal(payload, hidden), links.has_activation()
    dist.barrier()
    engine.close()
    return seen
