"""One micro-batch on one stage: its graph, the gradients that arrived, the gradients to pass on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ibp_deepspeed.comm.message import BoundaryError
from ibp_deepspeed.rng import RandomState


class LiveMicroBatch:
    """Activations of a micro-batch between its forward pass and its update.

    Args:
        trunk: f_k, or what follows its borrowed layers.
        borrowed: the first layers, where the loss of the stage before stands behind them.
        recompute: keep the stage's input instead of its graph between the products that fall together with the
            forward pass and the next one, and run the trunk once more there (once, whatever the number of products).

    Attributes:
        inputs: h_{k-1}, a leaf; on the first stage what the data loader gave.
        labels: for this stage's loss.
        sample_checksum: of the samples that the labels belong to.
        cut: what the borrowed layers give, a leaf; None if nothing is borrowed here.
        outputs: h_k, on the last stage its loss, undivided; with its graph while that is kept.
        cotangents: loss index → dL/dh_k, on the last stage dL/d(its undivided loss).
        borrowed_cotangents: loss index → dL/d(cut), of the loss that stands there.
        input_gradients: loss index → dL/dh_{k-1}.
        recomputations: how often the trunk ran again, 0 or 1.
    """

    def __init__(
        self,
        trunk: Callable[[Any], Any],
        *,
        borrowed: Callable[[Any], Any] | None = None,
        recompute: bool = False,
    ) -> None:
        self.trunk, self.borrowed = trunk, borrowed
        self.recompute = recompute
        self.inputs: Any = None
        self.labels: Any = None
        self.sample_checksum = 0
        self.cut: Tensor | None = None
        self.outputs: Any = None
        self.cotangents: dict[int, Tensor] = {}
        self.borrowed_cotangents: dict[int, Tensor] = {}
        self.input_gradients: dict[int, Tensor] = {}
        self.recomputations = 0
        self._behind_borrowed: Tensor | None = None  # the cut with the graph of the borrowed layers
        self._random_state: RandomState | None = None

    def forward(self, *, product_follows: bool) -> Any:
        """Run the trunk; the graph is built unless it would be dropped before anybody uses it."""
        if self.recompute:
            self._random_state = RandomState()
        with torch.set_grad_enabled(product_follows or not self.recompute):
            self._run()
        return self.outputs

    def drop_graph(self) -> None:
        """With recomputation on: forget the graph, keep the input (before the first recomputation only)."""
        if self.recompute and self.recomputations == 0:
            self.outputs = self.cut = self._behind_borrowed = None

    def borrowed_product(self, loss: int) -> None:
        """dL_loss/dh_{k-1} of the loss that stands behind the borrowed layers; the graph stays."""
        self._graph()
        self.input_gradients[loss] = self._through_borrowed(self.borrowed_cotangents[loss])

    def input_product(self, loss: int) -> Tensor:
        """dL_loss/dh_{k-1} from dL_loss/dh_k; the graph stays.

        Raises:
            BoundaryError: the stage's output does not depend on its input.
        """
        outputs = self._graph()
        start = self.inputs if self.cut is None else self.cut
        gradient = _product(outputs, start, self.cotangents[loss])
        self.input_gradients[loss] = gradient if self.cut is None else self._through_borrowed(gradient)
        return self.input_gradients[loss]

    def update(
        self, weights: dict[int, float], parameters: list[torch.nn.Parameter] | None, borrowed_share: float = 0.0
    ) -> None:
        """Accumulate the trunk's gradient of Σ weight · L.

        Args:
            weights: loss index → weight; all cotangents must be here.
            parameters: restrict the backward pass to these; None takes the gradient of the input too.
            borrowed_share: weight in the borrowed layers of the loss that stands behind them; the others keep the rest.
        """
        outputs = self._graph()
        if not outputs.requires_grad:
            return  # a frozen trunk on an input without gradient: nothing to train
        cotangent = None
        for loss, weight in weights.items():
            term = self.cotangents[loss] if weight == 1.0 else self.cotangents[loss] * weight
            cotangent = term if cotangent is None else cotangent + term
        if self.cut is None:
            torch.autograd.backward(outputs, cotangent, inputs=parameters)
            return
        torch.autograd.backward(outputs, cotangent)  # the cut is a leaf, so this ends there
        self._update_borrowed(parameters, borrowed_share)

    def _update_borrowed(self, parameters: list[torch.nn.Parameter] | None, share: float) -> None:
        assert self.cut is not None and self._behind_borrowed is not None
        cotangent = torch.zeros_like(self.cut) if self.cut.grad is None else self.cut.grad
        if share:
            (own,) = self.borrowed_cotangents.values()
            cotangent = cotangent * (1 - share) + own * share
        if self._behind_borrowed.requires_grad:
            torch.autograd.backward(self._behind_borrowed, cotangent, inputs=parameters)

    def free(self) -> None:
        """Give everything back."""
        self.inputs = self.labels = self.outputs = self.cut = self._behind_borrowed = None
        self.cotangents.clear()
        self.borrowed_cotangents.clear()

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
            with self._random_state.restored(), torch.enable_grad():
                self._run()
        return self.outputs

    def _run(self) -> None:
        hidden = self.inputs
        if self.borrowed is not None:
            self._behind_borrowed = self.borrowed(hidden)
            hidden = self.cut = self._behind_borrowed.detach().requires_grad_(self._behind_borrowed.requires_grad)
        self.outputs = self.trunk(hidden)

    def _through_borrowed(self, cotangent: Tensor) -> Tensor:
        assert self._behind_borrowed is not None
        return _product(self._behind_borrowed, self.inputs, cotangent)


def _product(outputs: Tensor, inputs: Tensor, cotangent: Tensor) -> Tensor:
    """Vector-Jacobian product; the graph stays.

    Raises:
        BoundaryError: the outputs do not depend on anything that is differentiated.
    """
    if not outputs.requires_grad:
        raise BoundaryError(
            "a stage's output carries no gradient, so no gradient can go upstream: don't detach hidden states."
        )
    (gradient,) = torch.autograd.grad(outputs, inputs, cotangent, retain_graph=True, materialize_grads=True)
    return gradient
