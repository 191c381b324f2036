"""The fused cross-entropy's place beside our chunks; the kernel itself runs on CUDA only."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibp_deepspeed.objectives import fused_cross_entropy
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss, LazyLogits


def in_place_kernel(weight: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    """What a kernel computes, with its backward pass in place."""
    return InPlace.apply(F.cross_entropy(F.linear(rows, weight, bias), labels, reduction="sum"))  # type: ignore[no-any-return]


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, loss: Tensor) -> Tensor:
        ctx.gradient = torch.ones_like(loss)  # type: ignore[attr-defined]
        return loss.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return ctx.gradient.mul_(grad)  # type: ignore[attr-defined, no-any-return]


def losses(device: str, dtype: torch.dtype, bias: bool, trained: bool = True) -> list[tuple[Tensor, list[Tensor]]]:
    """The loss and twice its gradient, differentiated twice: by the default path, then in chunks."""
    torch.manual_seed(0)
    readout = nn.Linear(16, 50, bias=bias, device=device, dtype=dtype).requires_grad_(trained)
    hidden = torch.randn(2, 9, 16, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 50, (2, 9), device=device)
    labels[0, :3] = -100
    parameters = tuple(readout.parameters()) if trained else ()
    rows = []
    for loss_fn in (CausalLMLoss(), CausalLMLoss(chunk_tokens=5)):
        loss = loss_fn(LazyLogits(hidden, readout, parameters), labels)
        first = torch.autograd.grad(loss / 3, [hidden, *parameters], retain_graph=True)
        second = torch.autograd.grad(loss / 3, [hidden, *parameters])
        rows.append((loss, [a + b for a, b in zip(first, second, strict=True)]))
    return rows


def assert_equal(rows: list[tuple[Tensor, list[Tensor]]], tolerance: float) -> None:
    (got, gradients), (want, wanted) = rows
    assert ((got - want).abs() / want).item() <= tolerance
    for a, b in zip(gradients, wanted, strict=True):
        assert a.dtype == b.dtype and float((a - b).norm() / b.norm()) <= tolerance


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_kernel_takes_the_place_of_chunks(monkeypatch: pytest.MonkeyPatch, bias: bool, trained: bool) -> None:
    kernel = Mock(side_effect=in_place_kernel)
    monkeypatch.setattr(fused_cross_entropy, "kernel", lambda: kernel)
    monkeypatch.setattr(fused_cross_entropy, "applies", lambda readout, hidden: isinstance(readout, nn.Linear))
    assert_equal(losses("cpu", torch.float64, bias, trained), 1e-12)
    assert kernel.call_count == 1


def test_no_kernel_on_cpu_or_without_a_linear_readout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_cross_entropy, "kernel", lambda: in_place_kernel)
    assert not fused_cross_entropy.applies(nn.Linear(2, 2), torch.zeros(1, 2))
    assert not fused_cross_entropy.applies(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs CUDA")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_kernel_on_cuda(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    pytest.importorskip("liger_kernel")
    assert_equal(losses("cuda", dtype, bias), tolerance)
