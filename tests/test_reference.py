"""The reference itself, against gradients known by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ibp_deepspeed import InterlockedReference

M = 3
A, B, C = 2.0, 3.0, 5.0  # three scalar stages
P, Q = 7.0, 11.0  # two scalar heads
XS = [1.0, 2.0, 4.0]


class Scale(nn.Module):
    """x → value · x, shape (1,)."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden


def linear_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return (labels * outputs).sum()


def gradients(interlocking: dict[str, Any]) -> list[float]:
    """Of the three trunks and the two heads, after one batch of M = 3 micro-batches."""
    stages, heads = [Scale(v) for v in (A, B, C)], [Scale(v) for v in (P, Q)]
    reference = InterlockedReference(stages, heads, linear_loss, interlocking)
    rows = [(torch.tensor([x], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)) for x in XS]
    losses = reference.accumulate(rows)
    mean = sum(XS) / M
    assert losses.tolist() == pytest.approx([P * A * mean, Q * B * A * mean, C * B * A * mean])
    return [float(module.weight.grad) for module in [*stages, *heads]]  # type: ignore[arg-type]


def test_closed_form_gradients() -> None:
    """L0 = P·A·x, L1 = Q·B·A·x, L2 = C·B·A·x; every loss is divided by M once."""
    x = sum(XS) / M
    heads = [A * x, B * A * x]
    assert gradients({"strategy": "local"}) == pytest.approx([P * x, Q * A * x, B * A * x, *heads])
    assert gradients({"strategy": "pairwise"}) == pytest.approx([Q * B * x, C * A * x, B * A * x, *heads])
    assert gradients({"strategy": "global"}) == pytest.approx([C * B * x, C * A * x, B * A * x, *heads])
    window = gradients({"strategy": "pairwise", "mode": "window"})
    assert window == pytest.approx([(P + Q * B) / 2 * x, (Q + C) / 2 * A * x, B * A * x, *heads])
    weighted = gradients({"strategy": "pairwise", "mode": "window", "window_weights": [1.0, 0.5]})
    assert weighted == pytest.approx([(P + 0.5 * Q * B) * x, (Q + 0.5 * C) * A * x, 1.5 * B * A * x, *heads])


def test_backpropagation_is_autograd() -> None:
    torch.manual_seed(0)
    stages = [nn.Linear(4, 4) for _ in range(3)]
    rows = [(torch.randn(2, 4), torch.randn(2, 4)) for _ in range(M)]
    reference = InterlockedReference(stages, None, nn.functional.mse_loss, {"strategy": "global", "aux_head": None})
    reference.accumulate(rows)
    got = [p.grad.clone() for stage in stages for p in stage.parameters() if p.grad is not None]
    parameters = [p for stage in stages for p in stage.parameters()]
    loss = torch.stack([nn.functional.mse_loss(nn.Sequential(*stages)(x), y) for x, y in rows]).mean()
    for mine, theirs in zip(got, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_local_learning_equals_detached_stages() -> None:
    """N = 1 is what a user would write with detach() between the stages."""
    torch.manual_seed(0)
    stages, heads = [nn.Linear(4, 4) for _ in range(3)], [nn.Linear(4, 2) for _ in range(2)]
    stages[2] = nn.Linear(4, 2)
    x, y = torch.randn(5, 4), torch.randn(5, 2)
    InterlockedReference(stages, heads, nn.functional.mse_loss, {"strategy": "local"}).accumulate([(x, y)])
    parameters = [p for module in [*stages, *heads] for p in module.parameters()]
    got = [p.grad for p in parameters]
    hidden, losses = x, []
    for k, stage in enumerate(stages):
        hidden = stage(hidden.detach())
        losses.append(nn.functional.mse_loss(heads[k](hidden) if k < 2 else hidden, y))
    want = torch.autograd.grad(losses[0] + losses[1] + losses[2], parameters)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
