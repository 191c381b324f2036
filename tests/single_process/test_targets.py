"""An objective that needs a later exit's outputs: by hand, in one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ibp_deepspeed import InterlockedReference
from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.objectives.cross_entropy import LazyLogits
from ibp_deepspeed.objectives.head import Objective


class Towards(Objective):
    """The squared distance to a later exit's outputs."""

    def loss(self, outputs: Tensor, labels: Tensor, target: Tensor | None = None) -> Tensor:
        assert target is not None and not target.requires_grad
        return (outputs - target).square().mean()


def test_the_target_is_the_later_exit_and_gets_no_gradient() -> None:
    torch.manual_seed(0)
    stages, head = [nn.Linear(3, 3, dtype=torch.float64) for _ in range(2)], nn.Linear(3, 3, dtype=torch.float64)
    reference = InterlockedReference(stages, [Towards(head, target=1)], nn.functional.mse_loss, {"strategy": "local"})
    inputs, labels = torch.randn(2, 4, 3, dtype=torch.float64)
    losses = reference.accumulate([(inputs, labels)])
    hidden = stages[0](inputs)
    target = stages[1](hidden).detach()
    by_hand = (head(hidden) - target).square().mean()
    want = torch.autograd.grad(by_hand, [*stages[0].parameters(), *head.parameters()])
    for parameter, gradient in zip([*stages[0].parameters(), *head.parameters()], want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    last = torch.autograd.grad(nn.functional.mse_loss(stages[1](hidden.detach()), labels), list(stages[1].parameters()))
    for parameter, gradient in zip(stages[1].parameters(), last, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert losses[0].item() == pytest.approx(by_hand.item())
    measured = reference.evaluate([(inputs, labels)])
    assert measured[0].item() == pytest.approx(nn.functional.mse_loss(head(hidden), labels).item())


def test_lazy_logits_are_a_target_too() -> None:
    linear = nn.Linear(3, 5)
    lazy = LazyLogits(torch.randn(2, 3, requires_grad=True), linear, tuple(linear.parameters()))
    target = lazy.detach().materialize()
    assert torch.equal(target, lazy.materialize()) and not target.requires_grad


def test_a_head_without_a_form_as_layers_says_so() -> None:
    with pytest.raises(InterlockingError, match="a Linear can't be written as layers of the model"):
        Objective(nn.Linear(2, 2)).as_layers()
