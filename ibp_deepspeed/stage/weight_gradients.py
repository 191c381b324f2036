"""Weight gradients that are computed later than the input gradients of the same backward pass (B, then W).

A linear layer keeps its input and the gradient of its output; everything else of the graph is freed by B. Its product
of the two is the one that autograd would have made, so numbers do not change, and nothing is computed twice. Other
weights (of norms, of experts in one tensor) get their gradients in B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Work = Callable[[], None]


class WeightGradients:
    """When the weight gradients of a stage's layers are computed: at once, later, or not at all."""

    def __init__(self) -> None:
        self._take: Callable[[Work], object] = _at_once

    def add(self, work: Work) -> None:
        """Called by a layer in its backward pass: ``work`` adds to the gradients of its weights."""
        self._take(work)

    @contextmanager
    def put_off(self, queue: list[Work]) -> Iterator[None]:
        """Around a backward pass whose weight gradients are computed later, by calling what is in the queue then."""
        with self._taken_by(queue.append):
            yield

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Around a backward pass that is for an input gradient alone."""
        with self._taken_by(lambda work: None):
            yield

    @contextmanager
    def _taken_by(self, take: Callable[[Work], object]) -> Iterator[None]:
        before, self._take = self._take, take
        try:
            yield
        finally:
            self._take = before


def _at_once(work: Work) -> None:
    work()


@runtime_checkable
class SplitsBackward(Protocol):
    """A layer that knows by itself how to compute its weight gradients later."""

    def split_backward(self, weight_gradients: WeightGradients) -> None:
        """From now on hand them to ``weight_gradients.add`` in backward passes, instead of computing them."""
        ...


def split_backward(layers: Iterable[Any], weight_gradients: WeightGradients) -> None:
    """Make the linear layers in some layers hand over their weights' gradients; what is :class:`SplitsBackward` does so
    for all that is in it. Other layers are left as they are."""
    for layer in dict.fromkeys(layers):
        if isinstance(layer, SplitsBackward):
            layer.split_backward(weight_gradients)
        elif type(layer) is nn.Linear:
            split_linear(layer, weight_gradients)
        elif isinstance(layer, nn.Module):
            split_backward(layer.children(), weight_gradients)


def split_linear(module: nn.Module, weight_gradients: WeightGradients, *, transposed: bool = False) -> None:
    """Do that to one layer x → x·Wᵀ + b, with ``transposed`` x → x·W + b, that has ``weight`` and ``bias``."""
    # a bound method, so that a copy of the layer has one of its own
    module.forward = MethodType(partial(_forward, transposed, weight_gradients), module)


def _forward(
    transposed: bool, weight_gradients: WeightGradients, module: nn.Module, *given: Tensor, **named: Tensor
) -> Tensor:
    (inputs,) = (*given, *named.values())  # nn.Linear and Conv1D name it differently
    # a weight that is computed from others (weight_norm) has a graph of its own, which B would free
    if torch.is_grad_enabled() and module.weight.requires_grad and module.weight.is_leaf:
        return _Linear.apply(inputs, module.weight, module.bias, transposed, weight_gradients)
    return type(module).forward(module, inputs)


class _Linear(torch.autograd.Function):
    """The product of a linear layer. Inputs [..., I], weight [O, I], or transposed [I, O], outputs [..., O]."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, gradients: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.bias, ctx.transposed, ctx.gradients = bias, transposed, gradients
        return F.linear(inputs, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # type: ignore[override]
        inputs, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        read = inputs.detach().reshape(-1, inputs.shape[-1])
        ctx.gradients.add(partial(_add_gradients, weight, ctx.bias, read, rows, ctx.transposed))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        product = rows @ (weight.t() if ctx.transposed else weight)
        return product.view(inputs.shape), None, None, None, None


def _add_gradients(weight: Tensor, bias: Tensor | None, read: Tensor, rows: Tensor, transposed: bool) -> None:
    """W of a linear layer, through autograd's own accumulation, on which DeepSpeed has hooks."""
    with torch.no_grad():
        found = read.t() @ rows if transposed else rows.t() @ read
    torch.autograd.backward(weight, found)
    if bias is not None and bias.requires_grad:
        torch.autograd.backward(bias, rows.sum(0))
