"""Layers that sleep instead of computing: two cores are enough for any number of stages.

What is measured with them is the schedule, the channels and an engine's own overhead.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

HEAD_UNITS = 0.1
WIDTH = 8


class Clock:
    """How long this process has slept."""

    slept = 0.0

    @classmethod
    def sleep(cls, seconds: float) -> None:
        """Sleep, and count what was asked for."""
        time.sleep(seconds)
        cls.slept += seconds


class _Sleep(torch.autograd.Function):
    """Identity that sleeps in its forward and in its backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, forward_seconds: float, backward_seconds: float) -> Tensor:
        ctx.seconds = backward_seconds
        if forward_seconds:
            Clock.sleep(forward_seconds)
        return tensor.clone()  # no view: torch detaches stage outputs in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.seconds:
            Clock.sleep(ctx.seconds)
        return gradient, None, None


class SleepingLayer(nn.Module):
    """``seconds`` forward, as much for the input gradient, as much again if the weights' gradient is taken."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        weight = _Sleep.apply(self.weight, 0.0, self.seconds)
        return _Sleep.apply(hidden + weight, self.seconds, self.seconds)


class SleepingHead(nn.Module):
    """All of a head's work, in its forward pass."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        return _Sleep.apply(hidden + self.weight, self.seconds, 0.0)


def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
    """Any loss will do."""
    return (outputs - labels).square().mean()
