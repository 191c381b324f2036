"""Objectives of a user's own in real processes, beside the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ibp_deepspeed import InterlockedPipelineModule, InterlockedReference, initialize
from ibp_deepspeed.objectives.head import Objective
from tests.toys import Head, layer_specs, loss_fn, micro_batches
from tests.workers.parity import compare

STAGES, COUNT = 3, 2


class Robust(Objective):
    """Another loss than the pipeline's, measured by the pipeline's, where large labels count more."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.smooth_l1_loss(outputs, labels)

    def weight(self, labels: Tensor) -> Tensor:
        return labels.abs().sum()


class Weighted:
    """The pipeline's loss, with weights of micro-batches."""

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return loss_fn(outputs, labels)

    def weight(self, labels: Tensor) -> Tensor:
        return labels.square().sum()


def objective(stage: int) -> Objective:
    return Robust(Head(100 + stage))


def module() -> InterlockedPipelineModule:
    return InterlockedPipelineModule(
        layer_specs(STAGES, torch.float32),
        num_stages=STAGES,
        loss_fn=Weighted(),
        aux_head=objective,
        partition_method=list(range(0, 2 * STAGES + 1, 2)),
    )


def config(interlocking: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": COUNT,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.3, "momentum": 0.9}},
        "interlocking": interlocking,
    }


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Largest relative errors of parameters after five batches, of losses, and of an evaluation."""
    engine = initialize(model=module(), config=config(case["interlocking"]))[0]
    layers = [spec.build() for spec in layer_specs(STAGES, torch.float32)]
    trunks = [nn.Sequential(*layers[2 * k : 2 * k + 2]) for k in range(STAGES)]
    heads = [objective(k) for k in range(STAGES - 1)]
    reference = InterlockedReference(trunks, heads, Weighted(), case["interlocking"])
    optimizer = torch.optim.SGD([p for k in range(STAGES) for p in reference.parameters(k)], lr=0.3, momentum=0.9)
    loss_error = 0.0
    for step in range(5):
        rows = micro_batches(step, COUNT)
        loss, losses = engine.train_batch(iter(rows)), reference.accumulate(rows)
        if engine.module.objectives:
            expected = losses[engine.module.losses[-1]].item()
            loss_error = max(loss_error, abs(loss.item() - expected) / expected)
        optimizer.step()
        optimizer.zero_grad()
    rows = micro_batches(9, 3)
    found, wanted = engine.eval_batch(iter(rows), 3), reference.evaluate(rows)
    parameters = [p for part in reference.modules(engine.stage_id) for p in part.parameters()]
    engine.close()
    return {
        "parameter": compare(list(engine.module.parameters()), parameters),
        "loss": loss_error,
        "eval": ((found - wanted).abs() / wanted).max().item(),
        "unweighted": ((wanted - reference.evaluate(rows, loss_fn)).abs() / wanted).max().item(),
    }
