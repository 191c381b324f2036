"""An objective of a user's own that wants late targets: by hand, in one process."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ibp_deepspeed import InterlockedReference
from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.objectives.head import Objective
from ibp_deepspeed.objectives.late_targets import LateTargets


@dataclass(frozen=True)
class Halves(LateTargets):
    """Half of what the next exit says, and its labels."""

    def of(self, outputs: Tensor, labels: Tensor) -> list[Tensor]:
        return [outputs / 2, labels]


class Towards(Objective):
    """The squared distance to these."""

    def late_loss(self, states: Tensor, labels: Tensor, targets: list[Tensor]) -> Tensor:
        wanted, said = targets
        assert torch.equal(said, labels) and not wanted.requires_grad and not states.requires_grad
        return (self.module(states) - wanted).square().mean()


def pipeline(objective: type[Objective], borrow: int = 0) -> InterlockedReference:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(3, 3, dtype=torch.float64)) for _ in range(2)]
    head = objective(nn.Linear(3, 3, dtype=torch.float64), late=Halves(delay=1))
    options = {"strategy": "local", "aux_head": {"borrow": borrow}}
    return InterlockedReference(stages, [head], nn.functional.mse_loss, options)


def test_the_next_exit_is_the_target_of_the_head_alone() -> None:
    reference = pipeline(Towards)
    (first, second), head = reference.stages, reference.aux_heads[0]
    before = torch.randn(2, 4, 3, dtype=torch.float64)
    reference.accumulate([(before[0], before[1])])
    for k in range(2):
        for parameter in reference.parameters(k):
            parameter.grad = None
    inputs, labels = torch.randn(2, 4, 3, dtype=torch.float64)
    losses = reference.accumulate([(inputs, labels)])
    own = nn.functional.mse_loss(head(first(inputs)), labels)
    hidden = first(before[0]).detach()
    late = (head(hidden) - second(hidden).detach() / 2).square().mean()
    want = [*torch.autograd.grad(own, [*first.parameters()], retain_graph=True)]
    want += torch.autograd.grad(own + late, [*head.parameters()])
    want += torch.autograd.grad(nn.functional.mse_loss(second(first(inputs).detach()), labels), [*second.parameters()])
    found = [p.grad for module in (first, head, second) for p in module.parameters()]
    torch.testing.assert_close(found, want)
    assert losses[0].item() == pytest.approx(own.item())
    assert reference.side_means[0]["late loss"] == pytest.approx(late.item())
    assert reference.evaluate([(inputs, labels)])[0].item() == pytest.approx(own.item())


def test_what_can_not_be_is_refused() -> None:
    sample = torch.randn(2, 4, 3, dtype=torch.float64)
    with pytest.raises(InterlockingError, match='which does not go together with "aux_head.borrow" 1'):
        pipeline(Towards, borrow=1)
    reference = pipeline(Objective)
    reference.accumulate([(sample[0], sample[1])])
    with pytest.raises(NotImplementedError, match="Objective wants late targets and has no late_loss"):
        reference.accumulate([(sample[0], sample[1])])


def test_a_head_without_a_form_as_layers_says_so() -> None:
    with pytest.raises(InterlockingError, match="a Linear can't be written as layers of the model"):
        Objective(nn.Linear(2, 2)).as_layers()
