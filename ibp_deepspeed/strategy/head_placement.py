"""Where the exits and their losses stand: which stage has one, which builds its head and computes its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ibp_deepspeed.config.interlocking import InterlockingConfig


@dataclass(frozen=True)
class HeadPlacement:
    """The places of the losses of a pipeline; loss k is the one behind trunk k, where that is an exit.

    The head of loss k < K-1 stands at the end of stage k. With borrowed layers it stands behind the first ``borrow``
    layers of stage k+1, which then builds it and computes the loss. The last loss is the model's own.

    Attributes:
        stages: K.
        borrow: q, borrowed layers.
        exits: the stages that have a loss, rising; the last one always has (None: all have).
    """

    stages: int
    borrow: int = 0
    exits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "exits", checked_exits(self.exits, self.stages))

    @classmethod
    def from_config(cls, interlocking: InterlockingConfig, stages: int, aux_heads: bool = True) -> HeadPlacement:
        """What a configuration means on ``stages`` stages; ``aux_heads``: whether there are heads at all.

        Raises:
            ConfigError: an exit beyond the last stage.
        """
        exits = interlocking.exits_for(stages) if aux_heads else (stages - 1,)
        return cls(stages, borrowed_layers(interlocking), exits)

    @property
    def losses(self) -> tuple[int, ...]:
        """All losses, rising."""
        assert self.exits is not None
        return self.exits

    @property
    def heads(self) -> tuple[int, ...]:
        """The losses that have an auxiliary head: all but the model's own."""
        return self.losses[:-1]

    @cached_property
    def _at(self) -> frozenset[int]:
        return frozenset(self.losses)

    def home(self, loss: int) -> int:
        """The stage that has the head of a loss and computes it."""
        return loss + 1 if self.borrow and loss < self.stages - 1 and loss in self._at else loss

    def losses_at(self, stage: int) -> list[int]:
        """The losses that a stage computes, in that order (two on the last stage with borrowed layers)."""
        return [loss for loss in (stage - 1, stage) if loss in self._at and self.home(loss) == stage]

    def reported_at(self, stage: int) -> list[int]:
        """The losses that a stage reports: those it computes, and its own if nobody does (NaN)."""
        return [loss for loss in range(self.stages) if self.home(loss) == stage]

    def head_at(self, stage: int) -> int | None:
        """The loss whose auxiliary head is on a stage, None if no such head is."""
        return next((loss for loss in self.losses_at(stage) if loss < self.stages - 1), None)

    def borrowed_from(self, stage: int) -> int:
        """How many of a stage's layers stand before a head: 0 if its head, if any, stands at its end."""
        return self.borrow if self.head_at(stage) not in (None, stage) else 0

    def boundary(self, loss: int, bounds: Sequence[int]) -> int:
        """The index of the layer before which the head of a loss stands.

        Args:
            loss: 0 … K-2, whether there is one or not.
            bounds: K+1 numbers; stage k has layers bounds[k] … bounds[k+1]-1.
        """
        return bounds[loss + 1] + self.borrow

    def boundaries(self, bounds: Sequence[int]) -> dict[int, int]:
        """Of all auxiliary heads: the layer before which one stands → the stage that has it."""
        return {self.boundary(loss, bounds): self.home(loss) for loss in self.heads}


def checked_exits(exits: Sequence[int] | None, stages: int) -> tuple[int, ...]:
    """The stages that have a loss; None: all of them.

    Raises:
        ValueError: they don't rise from 0 at least to the last stage.
    """
    if exits is None:
        return tuple(range(stages))
    if not exits or list(exits) != sorted(set(exits)) or exits[0] < 0 or exits[-1] != stages - 1:
        raise ValueError(f"exits must rise and end with the last of {stages} stages: {exits}")
    return tuple(exits)


def borrowed_layers(interlocking: InterlockingConfig) -> int:
    """How many layers of the next stage a head stands behind."""
    return interlocking.aux_head.borrow if interlocking.aux_head is not None else 0
