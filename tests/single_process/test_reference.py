"""The reference itself, against gradients known by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ibp_deepspeed import InterlockedReference
from ibp_deepspeed.errors import ConfigError

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


def chained(interlocking: dict[str, Any]) -> list[float]:
    """Gradients of stages (A), (B, C), (D, E) of scalar layers and of two heads, one micro-batch of x = 1."""
    layers = [Scale(v) for v in (A, B, C, D, E)]
    stages = [nn.Sequential(layers[0]), nn.Sequential(*layers[1:3]), nn.Sequential(*layers[3:])]
    heads = [Scale(P), Scale(Q)]
    reference = InterlockedReference(stages, heads, linear_loss, interlocking)
    one = torch.ones(1, dtype=torch.float64)
    reference.accumulate([(one, one)])
    return [float(module.weight.grad) for module in [*layers, *heads]]  # type: ignore[arg-type]


D, E = 13.0, 17.0


def test_borrowed_layers() -> None:
    """L0 = P·B·A behind B of the next stage, L1 = Q·D·C·B·A, L2 = E·D·C·B·A."""
    heads = [B * A, D * C * B * A]
    local = {"strategy": "local", "aux_head": {"borrow": 1}}
    l0, l1, l2 = P * B * A, Q * D * C * B * A, E * D * C * B * A
    assert chained({**local, "mode": "furthest"}) == pytest.approx([l0 / A, l1 / B, l1 / C, l2 / D, l2 / E, *heads])
    window = [l0 / A, (l0 + l1) / 2 / B, l1 / C, (l1 + l2) / 2 / D, l2 / E, *heads]
    assert chained({**local, "mode": "window"}) == pytest.approx(window)
    wider = {"strategy": "pairwise", "mode": "window", "aux_head": {"borrow": 1}}
    both = [(l0 + l1) / 2 / A, (l0 + l1 + l2) / 3 / B, (l1 + l2) / 2 / C, (l1 + l2) / 2 / D, l2 / E, *heads]
    assert chained(wider) == pytest.approx(both)


def test_more_borrowed_layers_than_a_stage_has_are_refused() -> None:
    with pytest.raises(ConfigError, match='borrow" is 3, but stage 1 is not an nn.Sequential of more'):
        chained({"strategy": "local", "aux_head": {"borrow": 3}})


class Follower(Scale):
    """A head that is a copy of the last stage's readout."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.own = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.weight.requires_grad_(False)

    def readout_tensors(self) -> list[Tensor]:
        return [self.weight]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.own * super().forward(hidden)


def followed(options: dict[str, Any], values: list[float]) -> list[float]:
    """The head's copy in each batch, if the last readout has these values as the batches begin."""
    last, head = Follower(values[0]).requires_grad_(True), Follower(99.0)
    config = {"strategy": "local", "aux_head": options}
    reference = InterlockedReference([Scale(1.0), last], [head], linear_loss, config)
    one = torch.ones(1, dtype=torch.float64)
    seen = []
    for value in values:
        with torch.no_grad():
            last.weight.fill_(value)
        seen.append(reference.accumulate([(one, one)])[0].item())
    return seen


@pytest.mark.parametrize(("options", "used"), [
    ({"readout": "frozen"}, [0, 0, 0, 0, 0, 0, 0, 0]),
    ({"readout": "shared", "refresh_interval": 2, "refresh_delay": 3}, [0, 0, 0, 0, 0, 2, 2, 4]),
    ({"readout": "shared", "refresh_interval": 1, "refresh_delay": 0}, [0, 1, 2, 3, 4, 5, 6, 7]),
    ({"readout": "shared", "refresh_interval": 3, "refresh_delay": 1}, [0, 0, 0, 0, 3, 3, 3, 6]),
])  # fmt: skip
def test_heads_use_the_readout_of_the_batch_that_the_rule_names(options: dict[str, Any], used: list[int]) -> None:
    """The last readout is t as batch t begins; the losses tell which one the head has."""
    assert followed(options, [float(t) for t in range(8)]) == used


def test_average_of_readouts() -> None:
    """copy ← β·copy + (1-β)·newest, from the initial one on."""
    options = {"readout": "shared", "refresh_interval": 1, "refresh_delay": 0, "average": 0.75}
    assert followed(options, [0.0, 16.0, 32.0]) == [0, 4, 11]
