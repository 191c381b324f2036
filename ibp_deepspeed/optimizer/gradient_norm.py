"""The norm of gradients, and what happens to a step when it is not finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, a scalar; 0 where there is none."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Leave the next step out: torch's optimizers touch neither weights nor moments of what has no gradient."""
    for parameter in parameters:
        parameter.grad = None


def left_out(who: str, batch: int) -> str:
    """The warning about a step that was not made; batches count from 1."""
    return (
        f"{who}, batch {batch}: the norm of the gradients is not finite, so this step is left out; the learning rate "
        "goes on"
    )
