"""How far the gradient that trains a trunk points where the last loss's would."""

from __future__ import annotations

import torch
from torch import Tensor

from ibp_deepspeed.single_process.reference import InterlockedReference
from ibp_deepspeed.strategy.timeline import Timeline


def cosines(reference: InterlockedReference, inputs: Tensor, labels: Tensor) -> list[float]:
    """For each trunk the cosine between its update gradient and ∂L_{K-1}/∂θ_k on one batch; 1 on the last. [K]

    Args:
        reference: at the weights to be looked at; its gradients are left alone.
        inputs, labels: a batch.
    """
    count = len(reference.stages)
    strategy = Timeline(reference.interlocking, count, 1, bool(reference.aux_heads)).at(reference.batch)[0]
    losses = reference.losses(inputs, labels)
    values = []
    for k, stage in enumerate(reference.stages):
        objective = torch.stack([losses[j] * weight for j, weight in strategy.weights(k).items()]).sum()
        used, true = (_flat_gradient(loss, stage) for loss in (objective, losses[count - 1]))
        values.append(torch.nn.functional.cosine_similarity(used, true, dim=0).item())
    return values


def _flat_gradient(loss: Tensor, stage: torch.nn.Module) -> Tensor:
    gradients = torch.autograd.grad(loss, list(stage.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])
