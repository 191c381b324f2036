"""One micro-batch on one stage: its graph, the gradients that arrived, the gradients to pass on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ibp_deepspeed.documents import Documents, reading
from ibp_deepspeed.errors import BoundaryError
from ibp_deepspeed.objectives.side_loss import SideLoss
from ibp_deepspeed.rng import RandomState


class MicroBatchInFlight:
    """Activations of a micro-batch between its forward pass and its update.

    Args:
        trunk: f_k, or what follows its borrowed layers.
        borrowed: the first layers, where the loss of the stage before stands behind them.
        recompute: keep the stage's input instead of its graph between the input gradients that fall together
            with the forward pass and the next one, and run the trunk once more there (once, whatever their number).
        again: what to enter around that second run.
        side_loss: gives a loss of the trunk's own after each of its forward passes.
        side_share: of this micro-batch in its mean, 1/M.

    Attributes:
        number: in its batch.
        inputs: h_{k-1}, a leaf; on the first stage what the data loader gave.
        labels: for this stage's loss.
        sample_checksum: of the samples that the labels belong to.
        documents: of its rows, where they hold several.
        cut: what the borrowed layers give, a leaf; None if nothing is borrowed here.
        side: the trunk's own loss while there is a graph.
        outputs: h_k, on the last stage its loss, undivided; with its graph while that is kept.
        output_gradients: loss index → dL/dh_k, on the last stage dL/d(its undivided loss).
        borrowed_gradients: loss index → dL/d(cut), of the loss that stands there.
        input_gradients: loss index → dL/dh_{k-1}.
        weight_gradients: what is left to do of an update whose input gradient came first.
        recomputations: how often the trunk ran again, 0 or 1.
    """

    def __init__(
        self,
        trunk: Callable[[Any], Any],
        *,
        borrowed: Callable[[Any], Any] | None = None,
        recompute: bool = False,
        again: Callable[[], AbstractContextManager[None]] = nullcontext,
        side_loss: Callable[[], SideLoss | None] | None = None,
        side_share: float = 1.0,
    ) -> None:
        self.trunk, self.borrowed = trunk, borrowed
        self.recompute, self._again = recompute, again
        self._side_loss, self._side_share = side_loss, side_share
        self.side: SideLoss | None = None
        self.number = 0
        self.inputs: Any = None
        self.labels: Any = None
        self.sample_checksum = 0
        self.documents: Documents | None = None
        self.cut: Tensor | None = None
        self.outputs: Any = None
        self.output_gradients: dict[int, Tensor] = {}
        self.borrowed_gradients: dict[int, Tensor] = {}
        self.input_gradients: dict[int, Tensor] = {}
        self.weight_gradients: list[Callable[[], None]] = []
        self.recomputations = 0
        self._behind_borrowed: Tensor | None = None  # the cut with the graph of the borrowed layers
        self._random_state: RandomState | None = None

    def forward(self, *, input_gradient_follows: bool) -> Any:
        """Run the trunk; the graph is built unless it would be dropped before anybody uses it."""
        if self.recompute:
            self._random_state = RandomState()
        with torch.set_grad_enabled(input_gradient_follows or not self.recompute):
            self._run()
        return self.outputs

    def drop_graph(self) -> None:
        """With recomputation on: forget the graph, keep the input (before the first recomputation only)."""
        if self.recompute and self.recomputations == 0:
            self.outputs = self.cut = self._behind_borrowed = self.side = None

    def backward_borrowed(self, loss: int) -> None:
        """dL_loss/dh_{k-1} of the loss that stands behind the borrowed layers; the graph stays."""
        self._graph()
        self.input_gradients[loss] = self._through_borrowed(self.borrowed_gradients[loss])

    def backward_input(self, loss: int) -> Tensor:
        """dL_loss/dh_{k-1} from dL_loss/dh_k; the graph stays.

        Raises:
            BoundaryError: the stage's output does not depend on its input.
        """
        outputs = self._graph()
        start = self.inputs if self.cut is None else self.cut
        gradient = _input_gradient(outputs, start, self.output_gradients[loss], *self._side_seed(1.0))
        self.input_gradients[loss] = gradient if self.cut is None else self._through_borrowed(gradient)
        return self.input_gradients[loss]

    def update(
        self,
        weights: dict[int, float],
        parameters: list[torch.nn.Parameter] | None,
        borrowed_share: float = 0.0,
        side_weight: float = 1.0,
    ) -> None:
        """Accumulate the trunk's gradient of Σ weight · L.

        Args:
            weights: loss index → weight; all output gradients must be here.
            parameters: restrict the backward pass to these; None takes the gradient of the input too.
            borrowed_share: weight in the borrowed layers of the loss that stands behind them; the others keep the rest.
            side_weight: of the trunk's own loss, which is a part of each of the losses.
        """
        outputs = self._graph()
        if not outputs.requires_grad:
            return  # a frozen trunk on an input without gradient: nothing to train
        gradient = None
        for loss, weight in weights.items():
            term = self.output_gradients[loss] if weight == 1.0 else self.output_gradients[loss] * weight
            gradient = term if gradient is None else gradient + term
        if self.cut is None:
            side = self._side_seed(side_weight)
            both = [outputs, *(value for value, _ in side)], [gradient, *(seed for _, seed in side)]
            torch.autograd.backward(*both, inputs=parameters)
            return
        torch.autograd.backward(outputs, gradient)  # the cut is a leaf, so this ends there
        self._update_borrowed(parameters, borrowed_share)

    def _update_borrowed(self, parameters: list[torch.nn.Parameter] | None, share: float) -> None:
        assert self.cut is not None and self._behind_borrowed is not None
        gradient = torch.zeros_like(self.cut) if self.cut.grad is None else self.cut.grad
        if share:
            (own,) = self.borrowed_gradients.values()
            gradient = gradient * (1 - share) + own * share
        if self._behind_borrowed.requires_grad:
            torch.autograd.backward(self._behind_borrowed, gradient, inputs=parameters)

    def update_weights(self, until: Callable[[], bool] = lambda: False) -> bool:
        """W of an update whose B came before: compute and forget what was put off, layer by layer.

        Args:
            until: asked after each layer; leave off when it says so.

        Returns:
            whether nothing is left.
        """
        while self.weight_gradients:
            self.weight_gradients.pop(0)()
            if until():
                break
        return not self.weight_gradients

    def free(self) -> None:
        """Give everything back, but what weight gradients that were put off are made of."""
        self.inputs = self.labels = self.outputs = self.cut = self._behind_borrowed = None
        self.side = self.documents = None
        self.output_gradients.clear()
        self.borrowed_gradients.clear()

    def input_gradient(self, weight: float) -> Tensor:
        """What :meth:`update` left at the input, as the gradient of the unweighted loss."""
        gradient = self.inputs.grad
        if gradient is None:
            gradient = torch.zeros_like(self.inputs)
        return gradient if weight == 1.0 else gradient / weight

    def _graph(self) -> Tensor:
        if self.outputs is None:
            assert self._random_state is not None
            self.recomputations += 1
            with self._random_state.restored(), self._again(), torch.enable_grad():
                self._run()
        return self.outputs

    def _run(self) -> None:
        hidden = self.inputs
        with reading(self.documents):
            if self.borrowed is not None:
                self._behind_borrowed = self.borrowed(hidden)
                hidden = self.cut = self._behind_borrowed.detach().requires_grad_(self._behind_borrowed.requires_grad)
            self.outputs = self.trunk(hidden)
            self.side = None if self._side_loss is None else self._side_loss()

    def _side_seed(self, weight: float) -> list[tuple[Tensor, Tensor]]:
        """The trunk's own loss and its gradient in a loss of that weight; none if nothing is trained by it."""
        if self.side is None or not self.side.value.requires_grad:
            return []
        value = self.side.value
        return [(value, torch.full_like(value, weight * self.side.factor * self._side_share))]

    def _through_borrowed(self, gradient: Tensor) -> Tensor:
        assert self._behind_borrowed is not None
        return _input_gradient(self._behind_borrowed, self.inputs, gradient)


def _input_gradient(outputs: Tensor, inputs: Tensor, output_gradient: Tensor, *side: tuple[Tensor, Tensor]) -> Tensor:
    """The vector-Jacobian product that takes a gradient from outputs to inputs; the graph stays.

    ``side`` are other scalars that the loss is made of, and their gradients.

    Raises:
        BoundaryError: the outputs do not depend on anything that is differentiated.
    """
    if not outputs.requires_grad:
        raise BoundaryError(
            "a stage's output carries no gradient, so no gradient can go upstream: don't detach hidden states."
        )
    both = [outputs, *(value for value, _ in side)], [output_gradient, *(seed for _, seed in side)]
    (gradient,) = torch.autograd.grad(both[0], inputs, both[1], retain_graph=True, materialize_grads=True)
    return gradient
