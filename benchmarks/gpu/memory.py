"""What a micro-batch of a layer or a head needs at its peak, from sizes: what a planner would count."""

from __future__ import annotations

from ibp_deepspeed.models.profiling.specimen import Specimen
from ibp_deepspeed.objectives.cross_entropy import CHUNK_LOGITS


def estimated_peak(thing: Specimen, kept: int, message: int) -> int:
    """Bytes: weights, with bf16 their gradients' sums in fp32, hidden states at both ends, what autograd keeps, and the
    larger of all gradients and (of what has a loss) a chunk's logits, in fp32 and in its own dtype.

    Optimizer states are not of a micro-batch. Kernels' workspaces and what the allocator rounds up come on top.

    Args:
        thing: the layer, or a head with its loss.
        kept: bytes that its autograd keeps.
        message: bytes of the hidden states.
    """
    size = thing.parameters[0].element_size()
    weights = sum(parameter.numel() for parameter in thing.parameters)
    sums = 4 * weights if size < 4 else 0
    chunk = 0 if thing.layers else CHUNK_LOGITS * (4 + 2 * size)  # in fp32; logits and their gradient in its own
    return size * weights + sums + 4 * message + kept + max(size * weights, chunk)
