"""Save after two batches, load into another engine, go on: the same parameters as without the stop."""

from __future__ import annotations

from typing import Any

import torch

from ibp_deepspeed import initialize
from tests.toys import make_module, micro_batches
from tests.workers.parity import compare


def engine_of(case: dict[str, Any]) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "zero_optimization": {"stage": case["zero"]},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.02}},
        "interlocking": {
            "strategy": "pairwise",
            "mode": "window",
            "schedule": [{"from_step": 3, "width": 1}],  # after the checkpoint
            "global_interval": 3,
        },
    }
    return initialize(model=make_module(2), config=config)[0]


def run_case(case: dict[str, Any]) -> dict[str, float]:
    engine = engine_of(case)
    rank = engine.grid.get_data_parallel_rank()
    rates = []
    for step in range(4):
        engine.train_batch(iter(micro_batches(step, 3, rank=rank)))
        rates.append(engine.get_lr()[0])
        if step == 1:
            engine.save_checkpoint(case["folder"], tag="middle")
    other = engine_of(case)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.zero_()
    path, _ = other.load_checkpoint(case["folder"], tag="middle")
    assert path is not None and other.global_steps == 2
    for step in (2, 3):
        other.train_batch(iter(micro_batches(step, 3, rank=rank)))
    difference = compare(list(other.module.parameters()), list(engine.module.parameters()))
    newest, told = engine.latest_losses(), engine.losses_after(1)
    assert [batch for _, batch in told] == list(range(2, 2 + len(told)))
    engine.close()
    other.close()
    return {"difference": difference, "rates": rates, "newest": None if newest is None else newest[1]}  # type: ignore[dict-item]
