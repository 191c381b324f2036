"""How far the gradient that trains a trunk points where the last loss's would, or a loss's over all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ibp_deepspeed.objectives.sampled_softmax import NegativeSample, sampled_cross_entropy
from ibp_deepspeed.single_process.reference import InterlockedReference
from ibp_deepspeed.strategy.timeline import Timeline

FEWEST, DRAWS = 256, 6


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
        used, true = (flat_gradient(loss, stage) for loss in (objective, losses[count - 1]))
        values.append(cosine(used, true))
    return values


def sampled_gradients(
    reference: InterlockedReference,
    batches: Sequence[tuple[Tensor, Tensor]],
    counts: Tensor,
    sizes: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Errors of the gradient of the trunks up to the first exit, by the tokens that its loss is taken over.

    Args:
        reference: at the weights to be looked at; its gradients are left alone.
        batches: inputs and labels, each on its own.
        counts: how often each token occurs.
        sizes: how many are drawn; None: 256, 512, 1024, … to half of the vocabulary.

    Returns:
        ``batches``: norm of the difference of two batches' exact gradients over that of one, the mean over all pairs;
        ``sizes``: S → the same between the loss over S tokens drawn by frequency and the exact one of the same batch,
        and the cosine between them, means over batches and DRAWS draws; ``vocabulary``: how many tokens there are.
    """
    exit_ = min(reference.placement.heads)
    trunk = torch.nn.ModuleList(reference.stages[: exit_ + 1])
    exact: list[Tensor] = []
    doublings = range((len(counts) // (2 * FEWEST)).bit_length())
    sizes = [FEWEST << i for i in doublings] if sizes is None else sizes
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    for number, (inputs, labels) in enumerate(batches):
        logits = reference.outputs(inputs)[exit_]
        loss = functional.cross_entropy(logits.materialize().flatten(0, -2).float(), labels.flatten())
        exact.append(flat_gradient(loss, trunk))
        for size in sizes:
            sample = NegativeSample(size, seed=0, counts=counts, by_frequency=True)
            for draw in range(DRAWS):
                drawn = sample.draw(len(counts), batch=number, micro_batch=draw, loss=exit_)
                gradient = flat_gradient(sampled_cross_entropy(logits, labels, *drawn), trunk)
                found[size].append((distance(gradient, exact[-1]), cosine(gradient, exact[-1])))
    return {
        "vocabulary": len(counts),
        "batches": mean(distance(a, b) for a, b in permutations(exact, 2)),
        "sizes": {str(size): [mean(column) for column in zip(*pairs, strict=True)] for size, pairs in found.items()},
    }


def distance(gradient: Tensor, to: Tensor) -> float:
    """‖gradient - to‖ / ‖to‖."""
    return float((gradient - to).norm() / to.norm())


def cosine(gradient: Tensor, to: Tensor) -> float:
    """Between both."""
    return float(functional.cosine_similarity(gradient, to, dim=0))


def flat_gradient(loss: Tensor, module: torch.nn.Module) -> Tensor:
    """∂loss/∂θ of all parameters of a module, one behind the other; the graph is kept."""
    gradients = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])
