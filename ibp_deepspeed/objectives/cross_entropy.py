"""What a language-model head returns, and its loss without the full logits.

A head costs tokens x vocabulary numbers, far more than the hidden states it reads, and here every stage has one.
So a head returns its normed hidden states together with the LM head that would turn them into logits, and the
loss takes the tokens in chunks and takes each chunk's gradient at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.objectives import fused_cross_entropy

CHUNK_LOGITS = 2**24
"""Logits of one chunk: 64 MiB in fp32."""

Readout = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LazyLogits:
    """Logits [..., V] that are not computed yet.

    Attributes:
        hidden: states after the final norm, [..., H].
        readout: maps rows [n, H] to logits [n, V]; row by row, so that it may be called in chunks.
        parameters: every parameter with requires_grad that the LM head depends on; others get no gradient.
    """

    hidden: Tensor
    readout: Readout
    parameters: tuple[nn.Parameter, ...]

    @property
    def vocabulary(self) -> int:
        """V, seen by reading out no rows at all."""
        with torch.no_grad():
            return self.readout(self.hidden.reshape(-1, self.hidden.shape[-1])[:0]).shape[-1]

    def materialize(self) -> Tensor:
        """The full logits [..., V], by ordinary autograd."""
        rows = self.readout(self.hidden.reshape(-1, self.hidden.shape[-1]))
        return rows.reshape(*self.hidden.shape[:-1], rows.shape[-1])

    def chunks(self) -> Iterator[Tensor]:
        """The logits of all tokens in their order, rows [t, V] at a time, which take at most 64 MiB in fp32."""
        rows = self.hidden.reshape(-1, self.hidden.shape[-1])
        return (self.readout(rows[part]) for part in _chunks(rows.shape[0], _default_chunk(self)))


@dataclass(frozen=True, eq=False)
class LogitsBeside(LazyLogits):
    """Lazy logits, and what an objective needs beside them.

    Attributes:
        states: what the head was given, [..., H].
        beside: the head's further module, which the objective applies to rows of them.
    """

    states: Tensor
    beside: nn.Module

    @classmethod
    def of(cls, outputs: object, objective: str) -> LogitsBeside:
        """A head's outputs, for an objective that needs these.

        Raises:
            InterlockingError: the head gives no hidden states beside its logits.
        """
        if not isinstance(outputs, cls):
            raise InterlockingError(f'"aux_head.objective" {objective} needs heads of a cut language model.')
        return outputs


def chunked_cross_entropy(
    logits: LazyLogits, labels: Tensor, *, chunk_tokens: int, ignore_index: int = -100, smoothing: float = 0.0
) -> Tensor:
    """Mean cross entropy in nats; at most ``chunk_tokens`` rows of logits exist at a time, backward included.

    Args:
        logits: of shape [..., V].
        labels: classes, shape [...]; those equal to ``ignore_index`` do not count.
        chunk_tokens: rows per call of the LM head, at least 1.
        smoothing: ε of the targets, which are 1 - ε at the label and ε spread evenly over all V.

    Returns:
        A scalar: fp32 if the logits are fp32 or less, fp64 if they are fp64; 0 with zero gradients if no label
        counts. It can be differentiated once, any number of times (``retain_graph``).

    Raises:
        InterlockingError: the labels have another shape than the tokens, or ``chunk_tokens`` is below 1.
    """
    if labels.shape != logits.hidden.shape[:-1]:
        raise InterlockingError(
            f"labels of shape {tuple(labels.shape)} do not fit logits for {tuple(logits.hidden.shape[:-1])} "
            "tokens: give one label a token"
        )
    if chunk_tokens < 1:
        raise InterlockingError(f"chunk_tokens is {chunk_tokens}: a chunk needs at least 1 token")
    rows = logits.hidden.reshape(-1, logits.hidden.shape[-1])
    # asked here because autograd.Function turns gradients off inside its forward
    wants_grad = torch.is_grad_enabled()
    options = (logits.readout, chunk_tokens, ignore_index, wants_grad, smoothing)
    return _ChunkedCrossEntropy.apply(options, labels.reshape(-1), rows, *logits.parameters)


class CausalLMLoss:
    """Mean cross entropy over next tokens, for full or lazy logits.

    Labels are already shifted: ``labels[b, s]`` is the token after position s, -100 where there is none.

    Args:
        chunk_tokens: tokens per chunk of lazy logits; None chooses it so that a chunk is 64 MiB in fp32, or takes a
            fused kernel (``fused_cross_entropy.py``) where there is one.
        smoothing: of the targets, see ``chunked_cross_entropy``; with it no fused kernel is taken.
    """

    def __init__(self, chunk_tokens: int | None = None, smoothing: float = 0.0) -> None:
        self.chunk_tokens, self.smoothing = chunk_tokens, smoothing

    def __call__(self, outputs: LazyLogits | Tensor, labels: Tensor) -> Tensor:
        """The scalar loss of logits [B, S, V] and labels [B, S], as in ``chunked_cross_entropy``."""
        if isinstance(outputs, LazyLogits):
            readout, rows = outputs.readout, outputs.hidden.flatten(0, -2)
            plain = self.chunk_tokens is None and not self.smoothing
            if plain and fused_cross_entropy.applies(readout, rows):
                total = fused_cross_entropy.cross_entropy_sum(readout, rows, labels.flatten())
                return total / _count(labels, -100)
            chunk_tokens = _default_chunk(outputs) if self.chunk_tokens is None else self.chunk_tokens
            return chunked_cross_entropy(outputs, labels, chunk_tokens=chunk_tokens, smoothing=self.smoothing)
        logits = outputs.flatten(0, -2).to(_loss_dtype(outputs.dtype))
        total = F.cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=self.smoothing)
        return total / _count(labels, -100)

    @staticmethod
    def weight(labels: Tensor) -> Tensor:
        """Labels that count: the weight of a micro-batch's mean loss in the mean over several. A scalar."""
        return (labels != -100).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Takes the gradients in forward, chunk by chunk, so that backward has only to scale them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        options: tuple[Readout, int, int, bool, float],
        labels: Tensor,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        readout, chunk_tokens, ignore_index, wants_grad, smoothing = options
        gradients = _Gradients(hidden, parameters, ctx.needs_input_grad[2:] if wants_grad else ())
        count = _count(labels, ignore_index)
        total = hidden.new_zeros((), dtype=_loss_dtype(hidden.dtype))
        for rows in _chunks(hidden.shape[0], chunk_tokens):
            chunk = hidden[rows].detach().requires_grad_(gradients.hidden is not None)
            with torch.set_grad_enabled(gradients.needed):
                logits = readout(chunk)
            log_probabilities = F.log_softmax(logits.detach(), -1, dtype=total.dtype)
            losses, counted = _token_losses(log_probabilities, labels[rows], ignore_index, smoothing)
            total = total + losses.sum()
            if logits.requires_grad:
                weights = counted.to(total.dtype) / count
                logit_gradient = _logit_gradient(log_probabilities, labels[rows], weights, smoothing)
                gradients.add(logits, logit_gradient.to(logits.dtype), rows, chunk)
        ctx.gradients_needed = gradients.mask
        ctx.save_for_backward(*gradients.finish())
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = iter(ctx.saved_tensors)
        # not in place: the same graph may be differentiated again
        return None, None, *(next(saved) * grad_output if needed else None for needed in ctx.gradients_needed)


class _Gradients:
    """Gradients of a loss with respect to hidden rows [T, H] and parameters, summed over chunks."""

    def __init__(self, hidden: Tensor, parameters: tuple[Tensor, ...], mask: tuple[bool, ...]) -> None:
        self.mask = mask or (False,) * (1 + len(parameters))
        self.needed = any(self.mask)
        self.hidden = torch.zeros_like(hidden) if self.mask[0] else None
        self.parameters = [p for p, needed in zip(parameters, self.mask[1:], strict=True) if needed]
        # many small bf16 addends into one bf16 sum would be lost to rounding
        self.sums = [torch.zeros_like(p, dtype=_loss_dtype(p.dtype)) for p in self.parameters]

    def add(self, logits: Tensor, gradient: Tensor, rows: slice, chunk: Tensor) -> None:
        """Carry one chunk's dL/dlogits [t, V] back, which frees the graph."""
        inputs = self.parameters if self.hidden is None else [chunk, *self.parameters]
        grads = list(torch.autograd.grad(logits, inputs, gradient, allow_unused=True))
        if self.hidden is not None:
            grad = grads.pop(0)
            if grad is not None:
                self.hidden[rows] = grad
        for total, grad in zip(self.sums, grads, strict=True):
            if grad is not None:
                total.add_(grad)

    def finish(self) -> list[Tensor]:
        """The gradients in the dtypes of their tensors, in the order of the mask's true entries."""
        sums = [total.to(p.dtype) for total, p in zip(self.sums, self.parameters, strict=True)]
        return sums if self.hidden is None else [self.hidden, *sums]


def _chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    return (slice(start, start + chunk_tokens) for start in range(0, tokens, chunk_tokens))


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _token_losses(
    log_probabilities: Tensor, labels: Tensor, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Loss of each row [t], 0 where its label does not count, and which count."""
    counted = labels != ignore_index
    losses = -log_probabilities.gather(1, labels.masked_fill(~counted, 0).unsqueeze(1)).squeeze(1)
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * log_probabilities.mean(1)
    return losses.masked_fill(~counted, 0.0), counted


def _logit_gradient(log_probabilities: Tensor, labels: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """weight · (probabilities - target) of each row, in the place of the log probabilities [t, V].

    Written out because autograd's way through log-softmax and the choice of the label's entry fills and reads two
    more tensors of this size, and a head is mostly this.
    """
    probabilities = log_probabilities.exp_()
    target = labels.masked_fill(weights == 0, 0).unsqueeze(1)
    probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, smoothing - 1.0))
    if smoothing:
        probabilities.sub_(smoothing / probabilities.shape[1])
    return probabilities.mul_(weights.unsqueeze(1))


def _count(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels that count, at least 1, as a tensor: a Python number would wait for the device."""
    return (labels != ignore_index).sum().clamp(min=1)


def _default_chunk(logits: LazyLogits) -> int:
    """Tokens whose fp32 logits take 64 MiB."""
    return max(1, CHUNK_LOGITS // max(1, logits.vocabulary))
