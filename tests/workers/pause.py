"""Four stages; the last one pauses in its first batch. Everybody stamps its forward passes and batches."""

from __future__ import annotations

import time
from typing import Any

import deepspeed
from torch import Tensor

from ibp_deepspeed import initialize
from tests.toys import make_module, micro_batches


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    count = case["micro_batches"]
    module = make_module(4)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": count,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "steps_per_print": None,
        "interlocking": case["interlocking"],
    }
    engine = initialize(model=module, config=config)[0]
    forwards: list[float] = []
    pause: list[float] = []
    data = [micro_batches(step, count) for step in range(case["batches"])]
    engine.train_batch(iter(data[0]))  # shapes are announced, connections made
    deepspeed.comm.barrier()

    def stamp(_: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        if engine.is_last_stage() and not pause:
            pause.append(time.time())
            time.sleep(case["seconds"])
            pause.append(time.time())
        forwards.append(time.time())

    module.forward_funcs[-1].register_forward_hook(stamp)
    batches = []
    for rows in data[1:]:
        engine.train_batch(iter(rows))
        batches.append(time.time())
    engine.close()
    return {"forwards": forwards, "batches": batches, "pause": pause}
