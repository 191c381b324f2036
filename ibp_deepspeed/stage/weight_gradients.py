"""Weight gradients that are computed later than the input gradients of the same backward pass (B, then W).

A linear layer, or a convolution of images, keeps its input and the gradient of its output; everything else of the
graph is freed by B. Its product of the two is the one that autograd would have made, so numbers do not change, and
nothing is computed twice. Other weights (of norms, of experts in one tensor) get their gradients in B.
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
    """Make linear layers and convolutions in some layers hand over their weights' gradients; what is
    :class:`SplitsBackward` does so for all that is in it. Other layers are left as they are."""
    for layer in dict.fromkeys(layers):
        if isinstance(layer, SplitsBackward):
            layer.split_backward(weight_gradients)
        elif type(layer) is nn.Linear:
            split_linear(layer, weight_gradients)
        elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            layer.forward = MethodType(partial(_convolve, weight_gradients), layer)  # type: ignore[method-assign]
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


def _convolve(weight_gradients: WeightGradients, module: nn.Conv2d, inputs: Tensor) -> Tensor:
    if torch.is_grad_enabled() and module.weight.requires_grad and module.weight.is_leaf and inputs.dim() == 4:
        return _Convolution.apply(inputs, module.weight, module.bias, module, weight_gradients)
    return nn.Conv2d.forward(module, inputs)


class _Convolution(torch.autograd.Function):
    """A convolution of images [B, C, h, w], zeros around them."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Conv2d, gradients: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.bias, ctx.gradients = bias, gradients
        ctx.shape = (module.stride, module.padding, module.dilation, False, (0, 0), module.groups)
        return F.conv2d(inputs, weight, bias, module.stride, module.padding, module.dilation, module.groups)  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # type: ignore[override]
        inputs, weight = ctx.saved_tensors
        ctx.gradients.add(partial(_add_convolution, weight, ctx.bias, inputs.detach(), gradient, ctx.shape))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        product = _back(gradient, inputs, weight, None, ctx.shape, (True, False, False))
        return product[0], None, None, None, None


def _add_convolution(
    weight: Tensor, bias: Tensor | None, inputs: Tensor, gradient: Tensor, shape: tuple[Any, ...]
) -> None:
    """W of a convolution."""
    has_bias = bias is not None and bias.requires_grad
    with torch.no_grad():
        _, found, of_bias = _back(gradient, inputs, weight, bias, shape, (False, True, has_bias))
    torch.autograd.backward(weight, found)
    if bias is not None and has_bias:
        torch.autograd.backward(bias, of_bias)


def _back(
    gradient: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: tuple[Any, ...],
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """What autograd calls too: gradients of input, weight and bias, those that are wanted."""
    sizes = None if bias is None else list(bias.shape)
    back: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        gradient, inputs, weight, sizes, *shape, wanted
    )
    return back


def _add_gradients(weight: Tensor, bias: Tensor | None, read: Tensor, rows: Tensor, transposed: bool) -> None:
    """W of a linear layer, through autograd's own accumulation, on which DeepSpeed has hooks."""
    with torch.no_grad():
        found = read.t() @ rows if transposed else rows.t() @ read
    torch.autograd.backward(weight, found)
    if bias is not None and bias.requires_grad:
        torch.autograd.backward(bias, rows.sum(0))
