"""Small pipelines that every rank, and the reference, build alike."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ibp_deepspeed import InterlockedPipelineModule, InterlockedReference
from ibp_deepspeed.stage.weight_gradients import WeightGradients, split_linear

WIDTH = 6


class Layer(nn.Module):
    """A linear map and a tanh, initialised from its seed alone."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64).to(dtype) * 0.6)
        self.bias = nn.Parameter(torch.randn(WIDTH, generator=generator, dtype=torch.float64).to(dtype) * 0.1)
        self.dropout = nn.Dropout(dropout)
        self._hidden = {"linear": nn.Linear(WIDTH, WIDTH, device="meta")}  # no child: the parameters are this layer's
        self._hidden["linear"].weight, self._hidden["linear"].bias = self.weight, self.bias

    def linear(self, hidden: Tensor) -> Tensor:
        return self._hidden["linear"](hidden.to(self.weight.dtype))  # the engine's bf16 casts weights, not data

    def split_backward(self, weight_gradients: WeightGradients) -> None:
        split_linear(self._hidden["linear"], weight_gradients)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.linear(hidden)))


class Head(Layer):
    """A linear readout."""

    def readout_tensors(self) -> list[Tensor]:
        return [self.weight, self.bias]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)


class FollowingHead(Layer):
    """A layer of its own before a copy of the last stage's readout, which is another one until it is made equal."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(seed, dtype)
        self.readout = Head(seed + 1000, dtype).requires_grad_(False)

    def readout_tensors(self) -> list[Tensor]:
        return self.readout.readout_tensors()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.readout(super().forward(hidden))


def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs - labels).square().mean()


def layer_specs(stages: int, dtype: torch.dtype, dropout: float = 0.0) -> list[LayerSpec]:
    """Two layers a stage, the last one linear."""
    count = 2 * stages
    specs = [LayerSpec(Layer, seed, dtype, dropout) for seed in range(count - 1)]
    return [*specs, LayerSpec(Head, count - 1, dtype)]


def make_module(
    stages: int,
    interlocking: Any = None,
    dtype: torch.dtype = torch.float32,
    *,
    heads: bool = True,
    dropout: float = 0.0,
    follow: bool = False,
) -> InterlockedPipelineModule:
    kind = FollowingHead if follow else Head
    bounds = list(range(0, 2 * stages + 1, 2))
    return InterlockedPipelineModule(
        layer_specs(stages, dtype, dropout),
        num_stages=stages,
        loss_fn=loss_fn,
        aux_head=(lambda stage: kind(100 + stage, dtype)) if heads else None,
        interlocking=interlocking,
        partition_method=bounds,
    )


def make_reference(
    stages: int,
    interlocking: Any,
    dtype: torch.dtype = torch.float32,
    *,
    heads: bool = True,
    follow: bool = False,
) -> InterlockedReference:
    kind = FollowingHead if follow else Head
    layers = [spec.build() for spec in layer_specs(stages, dtype)]
    trunks = [nn.Sequential(*layers[2 * k : 2 * k + 2]) for k in range(stages)]
    aux_heads = [kind(100 + k, dtype) for k in range(stages - 1)] if heads else None
    return InterlockedReference(trunks, aux_heads, loss_fn, interlocking)


def micro_batches(
    batch: int, count: int, dtype: torch.dtype = torch.float32, rank: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """``count`` micro-batches of 4 samples, the same wherever they are made."""
    generator = torch.Generator().manual_seed(1000 * batch + 17 * rank + 5)
    rows = torch.randn(count, 2, 4, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return [(pair[0], pair[1]) for pair in rows]
