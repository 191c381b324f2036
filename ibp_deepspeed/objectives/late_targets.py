"""Targets that a later exit gives an earlier one some batches after the forward pass: the rule and what is kept.

At some positions of every micro-batch of batch b the later exit says something of its outputs (:class:`LateTargets`),
and the earlier one keeps the states that its head was given there. As batch b + delay begins, it takes a loss of these
states and targets with the head that it has then, and adds the gradients of the head to those of that batch. The rule
knows batches only, not when messages arrive, so a run repeats exactly, and nobody waits inside a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.objectives.cross_entropy import LazyLogits
from ibp_deepspeed.rng import generator_of

Example = tuple[Tensor, Tensor, list[Tensor]]
"""Of one micro-batch: states [t, H], labels [t, …] and targets [t, …] each."""


@dataclass(frozen=True)
class LateTargets(ABC):
    """What an exit wants to know of the next one. It travels to that exit's process, and so must be picklable.

    Attributes:
        tokens: most positions of a micro-batch.
        delay: batches between the forward pass and the loss, at least 1; None: the least that nobody waits for.
        seed: of the draw of positions.
    """

    tokens: int = 256
    delay: int | None = None
    seed: int = 0

    @abstractmethod
    def of(self, outputs: Any, labels: Tensor) -> list[Tensor]:
        """What the next exit says; no gradient is needed.

        Args:
            outputs: of that exit at the positions: a tensor [t, …], or lazy logits [t, V].
            labels: [t, …].

        Returns:
            tensors [t, …] of up to five more dimensions, floating, int64 or int32.
        """

    def positions(self, count: int, *, batch: int, receiver: int, sender: int) -> Tensor:
        """Those of ``count`` that are drawn in ``batch``, rising, on the CPU. int64

        They depend on the seed, the batch and the two exits alone: both ends agree, and so do replicas.
        """
        generator = generator_of(self.seed, batch, receiver, sender)
        return torch.randperm(count, generator=generator)[: self.tokens].sort().values


@dataclass(frozen=True)
class LateWay:
    """From one exit back to the one before it.

    Attributes:
        receiver, sender: their stages.
        late: what the receiver wants.
        delay: batches between the forward pass and the loss.
    """

    receiver: int
    sender: int
    late: LateTargets
    delay: int

    def used_at(self, batch: int) -> int:
        """The batch whose targets the loss at the beginning of ``batch`` is of; negative: there is none yet."""
        return batch - self.delay

    def pending(self, batch: int) -> range:
        """The batches whose targets are not used before ``batch`` begins."""
        return range(max(0, batch - self.delay), batch)

    def rows(self, outputs: Any, labels: Any, batch: int) -> tuple[Any, Tensor]:
        """States or outputs [..., C] and labels [..., …] at the positions of ``batch``: [t, C] and [t, …].

        Raises:
            InterlockingError: the labels are not of these positions.
        """
        hidden = outputs.hidden if isinstance(outputs, LazyLogits) else outputs
        shape = getattr(hidden, "shape", (0,))[:-1]
        if not isinstance(labels, Tensor) or not shape or labels.shape[: len(shape)] != shape:
            said = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise InterlockingError(
                f"late targets need a label for each position, the labels of {tuple(shape)} positions are {said}: use "
                "another objective."
            )
        last, count = len(shape) - 1, shape.numel()
        where = {"batch": batch, "receiver": self.receiver, "sender": self.sender}
        drawn = self.late.positions(count, **where).to(labels.device)
        rows = hidden.flatten(0, last)[drawn]
        if isinstance(outputs, LazyLogits):
            rows = LazyLogits(rows, outputs.readout, outputs.parameters)
        return rows, labels.flatten(0, last)[drawn]

    @torch.no_grad()
    def targets(self, outputs: Any, labels: Any, batch: int) -> list[Tensor]:
        """What the sender says of a micro-batch's outputs. Raises as :meth:`rows`."""
        return [target.detach() for target in self.late.of(*self.rows(outputs, labels, batch))]


def late_ways(
    wanted: Mapping[int, LateTargets | None], exits: Sequence[int], micro_batches: int, *, borrow: int = 0
) -> list[LateWay]:
    """All ways of a pipeline.

    Args:
        wanted: by the exit that wants them; None: it wants none.
        exits: all, rising.
        micro_batches: M, for delays that are not given.
        borrow: layers of the next stage before heads.

    Raises:
        InterlockingError: heads that stand on another stage.
    """
    ways = []
    for receiver, sender in pairwise(exits):
        late = wanted.get(receiver)
        if late is not None:
            delay = least_late_delay(sender - receiver, micro_batches) if late.delay is None else late.delay
            ways.append(LateWay(receiver, sender, late, delay))
    if ways and borrow:
        raise InterlockingError(
            f"the objective of stage {ways[0].receiver} takes late targets, which does not go together with "
            f'"aux_head.borrow" {borrow}: use "blocks": 0 and "borrow": 0.'
        )
    return ways


def least_late_delay(apart: int, micro_batches: int) -> int:
    """⌈(d + 1)/M⌉ + 1 for exits d stages apart: the earlier one is d micro-batches ahead, and a message takes time."""
    return -(-(apart + 1) // micro_batches) + 1


@dataclass
class LateMemory:
    """What one exit keeps until it is used.

    Attributes:
        way: that ends here.
        kept: batch → states and labels of each of its micro-batches.
        targets: batch → targets of each of its micro-batches, as far as they have come.
    """

    way: LateWay
    kept: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    targets: dict[int, list[list[Tensor]]] = field(default_factory=dict)

    def keep(self, batch: int, states: Tensor, labels: Any) -> None:
        """A micro-batch of ``batch``: what the head is given there."""
        rows, labels = self.way.rows(states.detach(), labels, batch)
        self.kept.setdefault(batch, []).append((rows, labels))

    def take(self, batch: int) -> list[Example]:
        """The micro-batches of a batch, whose targets must have come; they are forgotten."""
        kept, targets = self.kept.pop(batch), self.targets.pop(batch)
        return [(*pair, target) for pair, target in zip(kept, targets, strict=True)]

    def state_dict(self, batch: int) -> dict[str, Any]:
        """What is pending before ``batch``, on the CPU."""
        pending = [b for b in self.way.pending(batch) if b in self.kept]
        return {
            "kept": {b: [(s.cpu(), y.cpu()) for s, y in self.kept[b]] for b in pending},
            "targets": {b: [[t.cpu() for t in row] for row in self.targets[b]] for b in pending},
        }

    def load_state_dict(self, state: Mapping[str, Any], batch: int, device: torch.device | str) -> list[int]:
        """Have what is pending before ``batch`` of a state, and nothing else; returns the batches that it lacks."""
        saved = state.get("kept", {})
        pending = [b for b in self.way.pending(batch) if b in saved]
        self.kept = {b: [(s.to(device), y.to(device)) for s, y in saved[b]] for b in pending}
        self.targets = {b: [[t.to(device) for t in row] for row in state["targets"][b]] for b in pending}
        return [b for b in self.way.pending(batch) if b not in saved]


def not_taken(stage: int, batches: Sequence[int]) -> str:
    """A line for the user: what a loaded checkpoint leaves out."""
    which = f"batch {batches[0]}" if len(batches) == 1 else f"batches {batches[0]} to {batches[-1]}"
    return f"stage {stage}: the late targets of {which} are left out, its head learns from later ones"
