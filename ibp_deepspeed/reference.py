"""Interlocking backpropagation in one process: the oracle of every test.

Plain autograd over an uncut forward pass, written from the definition of the gradients and from nothing else in
this package but the strategy's table of which loss trains which trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ibp_deepspeed.config import InterlockingConfig
from ibp_deepspeed.strategy import Strategy


class InterlockedReference:
    """K stages and K-1 heads on one device, differentiated as interlocking backpropagation says.

    Args:
        stages: the K trunks; stage k maps h_{k-1} to h_k, the last one to what ``loss_fn`` takes.
        aux_heads: the K-1 heads a_k, or None for backpropagation without heads.
        loss_fn: ``loss_fn(outputs, labels)`` → scalar.
        interlocking: the configuration, as in the DeepSpeed JSON.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        aux_heads: Sequence[nn.Module] | None,
        loss_fn: Callable[[Any, Any], Tensor],
        interlocking: InterlockingConfig | Mapping[str, Any],
    ) -> None:
        self.stages = list(stages)
        self.aux_heads = list(aux_heads) if aux_heads is not None else []
        self.loss_fn = loss_fn
        self.config = InterlockingConfig.parse(interlocking)
        self.strategy = Strategy.from_config(self.config, len(self.stages), aux_heads=aux_heads is not None)
        if aux_heads is not None and len(self.aux_heads) != len(self.stages) - 1:
            raise ValueError(f"{len(self.stages)} stages need {len(self.stages) - 1} heads, not {len(aux_heads)}")

    def parameters(self, stage: int) -> list[nn.Parameter]:
        """Trunk and head parameters of a stage, in that order."""
        modules = [self.stages[stage], *self.aux_heads[stage : stage + 1]]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def accumulate(self, micro_batches: Sequence[tuple[Any, Any]]) -> Tensor:
        """Add the gradients of one batch to ``.grad``.

        Args:
            micro_batches: M pairs of inputs and labels.

        Returns:
            The K losses, means over the micro-batches, detached; NaN where a stage has no loss. Shape [K].
        """
        scale = 1.0 / len(micro_batches)
        totals = [0.0] * len(self.stages)
        for inputs, labels in micro_batches:
            losses = self._losses(inputs, labels)
            self._accumulate_trunks(losses, scale)
            self._accumulate_heads(losses, scale)
            for k in range(len(self.stages)):
                totals[k] += float(losses[k].detach()) * scale if k in losses else float("nan")
        return torch.tensor(totals, dtype=torch.float64)

    def evaluate(self, micro_batches: Sequence[tuple[Any, Any]]) -> Tensor:
        """The K losses of some micro-batches without gradients. Shape [K]."""
        with torch.no_grad():
            rows = [self._losses(inputs, labels) for inputs, labels in micro_batches]
        mean = {k: sum(float(row[k]) for row in rows) / len(rows) for k in rows[0]}
        return torch.tensor([mean.get(k, float("nan")) for k in range(len(self.stages))], dtype=torch.float64)

    def _losses(self, inputs: Any, labels: Any) -> dict[int, Tensor]:
        """L_k of every stage that has one, on one connected graph."""
        losses, hidden = {}, inputs
        for k, stage in enumerate(self.stages):
            hidden = stage(hidden)
            if k < len(self.aux_heads):
                losses[k] = self.loss_fn(self.aux_heads[k](hidden), labels)
        losses[len(self.stages) - 1] = self.loss_fn(hidden, labels)
        return losses

    def _accumulate_trunks(self, losses: dict[int, Tensor], scale: float) -> None:
        """Σ_j w_{j-k} ∂L_j/∂θ_k over the losses that train trunk k."""
        for k, stage in enumerate(self.stages):
            objective = sum(weight * scale * losses[j] for j, weight in self.strategy.weights(k).items())
            _add_gradients(objective, [p for p in stage.parameters() if p.requires_grad])

    def _accumulate_heads(self, losses: dict[int, Tensor], scale: float) -> None:
        """∂L_k/∂φ_k; that h_k is an input of the head, not a variable, needs no detach here."""
        for k, head in enumerate(self.aux_heads):
            _add_gradients(scale * losses[k], [p for p in head.parameters() if p.requires_grad])


def _add_gradients(objective: Any, parameters: list[nn.Parameter]) -> None:
    if not parameters:
        return
    gradients = torch.autograd.grad(objective, parameters, retain_graph=True, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
