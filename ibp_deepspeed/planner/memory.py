"""What a stage holds, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ibp_deepspeed.planner.workload import Work, Workload

LOGITS = 2 * 2**26
"""A chunk of logits and its gradient, in fp32 (``objectives/cross_entropy.py``)."""

PUT_OFF = 0.77
"""Of what a micro-batch keeps, what its weight gradients are made of after its input gradient (docs/performance.md,
"held between": 0.56 to 0.77)."""


@dataclass(frozen=True)
class Memory:
    """Of one stage, bytes.

    Attributes:
        weights, gradients, optimizer: of trunk and head.
        head: what of these is the auxiliary head's.
        activations: of all micro-batches in flight, and a chunk of logits.
    """

    weights: float
    gradients: float
    optimizer: float
    head: float
    activations: float

    @property
    def total(self) -> float:
        """Without the allocator's gaps, the runtime's own and messages under way."""
        return self.weights + self.gradients + self.optimizer + self.activations


def stage_memory(
    workload: Workload,
    bounds: Sequence[int],
    stage: int,
    in_flight: float,
    *,
    head: bool,
    zero: int = 0,
    replicas: int = 1,
    recompute: bool = False,
    weight_versions: int = 1,
    put_off: float = 0.0,
) -> Memory:
    """What a stage holds at most.

    Args:
        workload, bounds, stage: which layers.
        in_flight: micro-batches whose activations it holds as a whole.
        head: whether an auxiliary head is on it.
        zero: ZeRO stage, 0 or 1 (1: the optimizer's state is divided between replicas).
        replicas: data-parallel ranks.
        recompute: only the stage's input is kept, and one micro-batch's activations.
        weight_versions: sets of weights (asynchronous pipelines keep two).
        put_off: micro-batches beside these whose weight gradients alone are due, recomputed or not.
    """
    trunk = workload.stage(bounds, stage)
    of_head = workload.head if head else None
    muon = workload.optimizer == "Muon"
    weights, gradients, optimizer = _states(trunk, workload.weight_bytes, zero, replicas, muon)
    head_states = (0.0, 0.0, 0.0) if of_head is None else _states(of_head, workload.weight_bytes, zero, replicas, muon)
    kept = trunk.kept if not recompute else workload.message
    activations = in_flight * kept + put_off * PUT_OFF * trunk.kept + (trunk.kept if recompute else 0.0)
    has_logits = head or stage == len(bounds) - 2
    return Memory(
        weights=weights * weight_versions + head_states[0],
        gradients=gradients + head_states[1],
        optimizer=optimizer + head_states[2],
        head=sum(head_states),
        activations=activations + (LOGITS if has_logits else 0),
    )


def _states(work: Work, weight_bytes: int, zero: int, replicas: int, muon: bool) -> tuple[float, float, float]:
    """Weights, gradients (summed in fp32 with ZeRO 1) and the optimizer's state, with fp32 copies of 16-bit weights.

    AdamW has two moments of a parameter, Muon one of its matrices and two of all else; all are fp32.
    """
    copies = 4 if weight_bytes < 4 else 0
    gradient_bytes = 4 if weight_bytes == 4 or zero else weight_bytes
    share = replicas if zero else 1
    moments = 2 * work.trained - (work.matrices if muon else 0)
    return (
        float(work.parameters * weight_bytes),
        float(work.trained * gradient_bytes),
        (4 * moments + copies * work.trained) / share,
    )
