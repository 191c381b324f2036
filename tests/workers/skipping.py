"""A stage whose gradients are not finite in one batch, or that has none: what it says, what it and the others do."""

from __future__ import annotations

import logging
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from deepspeed.utils import logger
from torch import Tensor

from ibp_deepspeed import InterlockedPipelineModule, initialize
from ibp_deepspeed.errors import ModuleError
from tests.toys import Layer, layer_specs, loss_fn, micro_batches
from tests.workers.failures import module_with

STAGES, COUNT, BATCHES, BAD = 3, 2, 4, 1


class Exploding(Layer):
    """Infinite outputs in batch ``BAD``."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        batch, self.calls = self.calls // COUNT, self.calls + 1
        return super().forward(hidden) * (torch.inf if batch == BAD else 1.0)


class Unused(Layer):
    """Frozen, but for parameters that nothing uses: a matrix, and perhaps a vector, which would be in another group."""

    def __init__(self, seed: int, vector: bool) -> None:
        super().__init__(seed)
        self.requires_grad_(False)
        self.unused = torch.nn.Parameter(torch.ones(2, 2))
        self.idle = torch.nn.Parameter(torch.ones(2), requires_grad=vector)


def make_module(case: dict[str, Any]) -> InterlockedPipelineModule:
    if case["what"] == "infinite":
        return module_with(LayerSpec(Exploding, 9), STAGES, at=2 * STAGES - 2)
    specs = [LayerSpec(Unused, seed, case["what"] != "uneven groups") for seed in range(2)] + layer_specs(
        STAGES, torch.float32
    )[2:]
    return InterlockedPipelineModule(
        specs, num_stages=STAGES, loss_fn=loss_fn, aux_head=None, partition_method="uniform"
    )


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    heads: dict[str, Any] = {"strategy": "local", "non_finite": "skip_batch"}
    without = {"strategy": "global", "aux_head": None, "clip_scope": "global"}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": COUNT,
        "gradient_clipping": case["clip"],
        "zero_optimization": {"stage": case["zero"]},
        "bf16": {"enabled": case["bf16"]},
        "optimizer": {"type": case.get("optimizer", "AdamW"), "params": {"lr": 0.01, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_num_steps": 10, "warmup_min_lr": 0.01, "warmup_max_lr": 0.02},
        },
        "interlocking": heads if case["what"] == "infinite" else without,
    }
    try:
        engine = initialize(model=make_module(case), config=config)[0]
    except ModuleError as error:
        return {"refused": str(error)}
    rates, moved, norms = [], [], []
    with Listener() as said:
        for batch in range(BATCHES):
            before = [p.detach().clone() for p in engine.module.parameters()]
            engine.train_batch(iter(micro_batches(batch, COUNT)))
            rates.append(engine.get_lr()[0])
            norms.append(float(engine.get_global_grad_norm() or 0.0))
            moved.append(not all(map(torch.equal, before, engine.module.parameters())))
    finite = all(bool(p.isfinite().all()) for p in engine.module.parameters())
    engine.close()
    return {
        "rates": rates,
        "moved": moved,
        "norms": norms,
        "finite": finite,
        "said": said.lines,
        "skipped": engine.skipped_steps,
    }


class Listener(logging.Handler):
    """DeepSpeed's log from warnings on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self._level = logger.level

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Listener:
        logger.addHandler(self)
        logger.setLevel(logging.WARNING)
        return self

    def __exit__(self, *_: Any) -> None:
        logger.setLevel(self._level)
        logger.removeHandler(self)
