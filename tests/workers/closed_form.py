"""Three scalar stages in three processes: gradients known by hand, M = 3."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.pipe import LayerSpec

from ibp_deepspeed import InterlockedPipelineModule, initialize
from tests.single_process.test_reference import XS, A, B, C, M, P, Q, Scale, linear_loss


def run_case(interlocking: dict[str, Any]) -> dict[str, float]:
    module = InterlockedPipelineModule(
        [LayerSpec(Scale, value) for value in (A, B, C)],
        num_stages=3,
        loss_fn=linear_loss,
        aux_head=lambda stage: Scale((P, Q)[stage]),
        interlocking=interlocking,
        partition_method="uniform",
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": M,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "gradient_clipping": 0.0,
    }
    engine = initialize(model=module, config=config)[0]
    before = {name: p.item() for name, p in module.named_parameters()}
    one = torch.tensor([1.0], dtype=torch.float64)
    loss = engine.train_batch(iter([(one * x, one) for x in XS]))
    engine.close()
    named = {"head" if "aux" in name else "trunk": before[name] - p.item() for name, p in module.named_parameters()}
    return {**named, "loss": loss.item()}
