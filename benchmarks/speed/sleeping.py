"""Layers that sleep instead of computing: two cores are enough for any number of stages.

What is measured with them is the schedule, the channels and an engine's own overhead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ibp_deepspeed.stage.weight_gradients import WeightGradients

HEAD_UNITS = 0.1
WIDTH = 8
_FORGIVEN = 0.005  # seconds of a sleep that was too long; more is the machine's, and stays lost
PIECES = 7  # of a layer's weight gradient, as a Llama layer has linear layers


class Clock:
    """How long this process has slept."""

    slept = 0.0
    _overslept = 0.0

    @classmethod
    def sleep(cls, seconds: float) -> None:
        """Sleep, and count what was asked for; what a sleep was too long is taken off the next ones."""
        began = time.perf_counter()
        time.sleep(max(0.0, seconds - cls._overslept))
        cls._overslept = min(_FORGIVEN, cls._overslept + time.perf_counter() - began - seconds)
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


class _SleepLater(torch.autograd.Function):
    """A sum with a weight, whose gradient is slept for when it is asked for."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, weight: Tensor, seconds: float, weight_gradients: WeightGradients) -> Tensor:
        ctx.given = weight, seconds, weight_gradients
        return tensor + weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        weight, seconds, weight_gradients = ctx.given

        for piece in range(PIECES):
            share = partial(Clock.sleep, seconds / PIECES)
            last = (
                partial(torch.autograd.backward, weight, gradient.reshape(-1, WIDTH).sum(0))
                if piece == PIECES - 1
                else None
            )
            weight_gradients.add(partial(_in_turn, share, last))
        return gradient, None, None, None


def _in_turn(first: Callable[[], object], then: Callable[[], object] | None) -> None:
    first()
    if then is not None:
        then()


class SleepingLayer(nn.Module):
    """``seconds`` forward, as much for the input gradient, as much again if the weights' gradient is taken."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.zeros(WIDTH))
        self.weight_gradients: WeightGradients | None = None

    def split_backward(self, weight_gradients: WeightGradients) -> None:
        """Sleep for the weights' gradient when it is computed."""
        self.weight_gradients = weight_gradients

    def forward(self, hidden: Tensor) -> Tensor:
        if self.weight_gradients is not None and torch.is_grad_enabled():
            hidden = _SleepLater.apply(hidden, self.weight, self.seconds, self.weight_gradients)
            return _Sleep.apply(hidden, self.seconds, self.seconds)
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
