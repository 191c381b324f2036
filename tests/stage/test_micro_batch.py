"""One micro-batch on one stage, without processes: products, updates, recomputation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ibp_deepspeed.errors import BoundaryError
from ibp_deepspeed.stage.micro_batch import MicroBatchInFlight


def gradients(recompute: bool, products: int) -> tuple[list[Tensor], int]:
    """Input products of losses 1 … ``products`` at different times, then a weighted update, through dropout."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 5))
    cotangents = torch.randn(products + 1, 3, 5)
    live = MicroBatchInFlight(trunk, recompute=recompute)
    live.inputs = torch.randn(3, 5).requires_grad_()
    live.forward(input_gradient_follows=True)
    live.output_gradients[0] = cotangents[0]
    found = [live.backward_input(0)]
    live.drop_graph()
    if recompute:
        assert live.outputs is None, "the graph is given back between the products"
    torch.rand(7)  # other micro-batches draw random numbers meanwhile
    for loss in range(1, products + 1):
        live.output_gradients[loss] = cotangents[loss]
        found.append(live.backward_input(loss))
    live.update({loss: 1.0 / (loss + 1) for loss in range(products + 1)}, list(trunk.parameters()))
    after = torch.rand(1)  # the generator went on undisturbed
    return [*found, *(p.grad for p in trunk.parameters() if p.grad is not None), after], live.recomputations


@pytest.mark.parametrize("products", [1, 2, 4])
def test_recomputation_happens_once_and_changes_nothing(products: int) -> None:
    plain, none = gradients(False, products)
    again, once = gradients(True, products)
    assert (none, once) == (0, 1)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_weighted_input_gradient_is_sent_unweighted() -> None:
    live = MicroBatchInFlight(nn.Linear(2, 2))
    live.inputs = torch.randn(3, 2).requires_grad_()
    live.forward(input_gradient_follows=True)
    live.output_gradients[4] = torch.randn(3, 2)
    raw = live.backward_input(4).clone()
    live.update({4: 0.25}, None)
    torch.testing.assert_close(live.input_gradient(0.25), raw)


def test_an_output_without_gradient_is_an_error_not_a_hang() -> None:
    live = MicroBatchInFlight(lambda hidden: hidden.detach())
    live.inputs = torch.randn(3, 2).requires_grad_()
    live.forward(input_gradient_follows=True)
    live.output_gradients[0] = torch.randn(3, 2)
    with pytest.raises(BoundaryError, match="carries no gradient"):
        live.backward_input(0)
