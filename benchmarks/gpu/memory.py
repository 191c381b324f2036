"""What a micro-batch of a stage needs at its peak, from sizes: what a planner would count, beside the device's peak."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from benchmarks.speed.cases.profile import Stage
from benchmarks.speed.saved import SavedActivations
from ibp_deepspeed.objectives.cross_entropy import CHUNK_LOGITS


def estimated_peak(stage: Stage) -> int:
    """Bytes: weights, hidden states at the boundaries, what the trunk's autograd saves (counted), and the larger of

    * the head at work: its gradient, that gradient's sum in fp32, and a chunk's logits, in fp32 and in its own dtype;
    * the end of the backward pass: all gradients.

    Optimizer states are not of a micro-batch. Kernels' workspaces and what the allocator rounds up come on top.
    """
    trunk, head = (_bytes(part.parameters()) for part in (stage.trunk, stage.head))
    boundaries = 4 * _bytes([stage.inputs])  # hidden states in and out, and their gradients
    sums = 4 * sum(parameter.numel() for parameter in stage.head.parameters())
    chunk = CHUNK_LOGITS * (4 + 2 * stage.inputs.element_size())  # in fp32; logits and their gradient in its own
    return trunk + head + boundaries + _saved(stage.trunk, stage.inputs) + head + max(sums + chunk, trunk)


def _saved(trunk: nn.Module, inputs: Tensor) -> int:
    counter = SavedActivations(trunk.parameters())
    counter.watched("trunk", trunk)(inputs)
    return counter.peak["trunk"]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
