"""One micro-batch on one stage: its graph, the gradients that arrived, the gradients to pass on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ibp_deepspeed.channels import BoundaryError


class LiveMicroBatch:
    """Activations of a micro-batch between its forward pass and its update.

    Args:
        trunk: f_k.
        recompute: keep the stage's input instead of its graph between the products that fall together with the
            forward pass and the next one, and run the trunk once more there (once, whatever the number of products).

    Attributes:
        inputs: h_{k-1}, a leaf; on the first stage what the data loader gave.
        labels: for this stage's loss.
        sample_checksum: of the samples that the labels belong to.
        outputs: h_k (on the last stage what the loss function takes), with its graph while that is kept.
        loss: the last stage's own loss, undivided, with its graph.
        cotangents: loss index → dL/dh_k.
        input_gradients: loss index → dL/dh_{k-1}.
        recomputations: how often the trunk ran again, 0 or 1.
    """

    def __init__(self, trunk: Callable[[Any], Any], *, recompute: bool = False) -> None:
        self.trunk = trunk
        self.recompute = recompute
        self.inputs: Any = None
        self.labels: Any = None
        self.sample_checksum = 0
        self.outputs: Any = None
        self.loss: Tensor | None = None
        self.cotangents: dict[int, Tensor] = {}
        self.input_gradients: dict[int, Tensor] = {}
        self.recomputations = 0
        self._random_state: _RandomState | None = None

    def forward(self, *, product_follows: bool) -> Any:
        """Run the trunk; the graph is built unless it would be dropped before anybody uses it."""
        if self.recompute:
            self._random_state = _RandomState()
        with torch.set_grad_enabled(product_follows or not self.recompute):
            self.outputs = self.trunk(self.inputs)
        return self.outputs

    def drop_graph(self) -> None:
        """With recomputation on: forget the graph, keep the input (before the first recomputation only)."""
        if self.recompute and self.recomputations == 0:
            self.outputs = None

    def input_product(self, loss: int) -> Tensor:
        """dL_loss/dh_{k-1} from dL_loss/dh_k; the graph stays.

        Raises:
            BoundaryError: the stage's output does not depend on its input.
        """
        outputs = self._graph()
        if not outputs.requires_grad:
            raise BoundaryError(
                "a stage's output carries no gradient, so no gradient can go upstream: don't detach hidden states."
            )
        (gradient,) = torch.autograd.grad(
            outputs, self.inputs, self.cotangents[loss], retain_graph=True, materialize_grads=True
        )
        self.input_gradients[loss] = gradient
        return gradient

    def update(self, weights: dict[int, float], parameters: list[torch.nn.Parameter] | None) -> None:
        """Accumulate the trunk's gradient of Σ weight · L.

        Args:
            weights: loss index → weight; all cotangents must be here.
            parameters: restrict the backward pass to these; None takes the gradient of the input too.
        """
        outputs = self._graph()
        if not outputs.requires_grad:
            return  # a frozen trunk on an input without gradient: nothing to train
        cotangent = None
        for loss, weight in weights.items():
            term = self.cotangents[loss] if weight == 1.0 else self.cotangents[loss] * weight
            cotangent = term if cotangent is None else cotangent + term
        torch.autograd.backward(outputs, cotangent, inputs=parameters)

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
                self.outputs = self.trunk(self.inputs)
        return self.outputs


class _RandomState:
    """Random generator states at a forward pass, so that dropout repeats itself."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.accelerator = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A context with these states; the generators go on undisturbed after it."""
        devices = [torch.cuda.current_device()] if self.accelerator is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu)
            if self.accelerator is not None:
                torch.cuda.set_rng_state(self.accelerator)
            yield
