"""A fused linear cross-entropy in the place of chunks: on CUDA, for linear LM heads, if Liger-Kernel is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(weight [V, H], rows [T, H], labels [T], bias [V] or None) → the sum of the losses."""


@cache
def kernel() -> Kernel | None:
    """Liger-Kernel's, with sums of gradients in fp32; None where it is not installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss: Kernel = LigerFusedLinearCrossEntropyLoss(reduction="sum", ignore_index=-100, accum_dtype=torch.float32)
    return loss


def applies(readout: object, hidden: Tensor) -> TypeGuard[nn.Linear]:
    """Whether ``readout`` is one whose chunks the kernel can take the place of."""
    return hidden.is_cuda and isinstance(readout, nn.Linear) and kernel() is not None


def cross_entropy_sum(readout: nn.Linear, rows: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of rows [T, H] with labels [T], those of -100 left out: a scalar.

    As our own chunks it takes the gradients at once, and can be differentiated any number of times (the kernel's own
    backward pass scales them in place, which allows one).
    """
    return _Fused.apply(labels, rows, readout.weight, readout.bias, torch.is_grad_enabled())


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, labels: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, wants_grad: bool
    ) -> Tensor:
        run = kernel()
        assert run is not None
        needed = ctx.needs_input_grad[1:4] if wants_grad else (False,) * 3
        given = [
            None if t is None else t.detach().requires_grad_(n)
            for t, n in zip((rows, weight, bias), needed, strict=True)
        ]
        with torch.enable_grad():
            total = run(given[1], given[0], labels, given[2])  # type: ignore[arg-type]
        trained = [t for t in given if t is not None and t.requires_grad]
        ctx.needed = needed
        ctx.save_for_backward(*(torch.autograd.grad(total, trained) if trained else ()))
        return total.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = iter(ctx.saved_tensors)
        return None, *(next(saved) * grad_output if needed else None for needed in ctx.needed), None
