"""Where the losses stand: the one answer to where a head is, which stage builds it and which computes its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ibp_deepspeed.config.interlocking import InterlockingConfig


@dataclass(frozen=True)
class HeadPlacement:
    """The places of the K losses of a pipeline; loss k is the one behind trunk k.

    The head of loss k < K-1 stands at the end of stage k. With borrowed layers it stands behind the first ``borrow``
    layers of stage k+1, which then builds it and computes the loss. The last loss is the model's own.

    Attributes:
        stages: K.
        borrow: q, borrowed layers; 0 without heads.
        aux_heads: whether stages before the last have a loss.
    """

    stages: int
    borrow: int = 0
    aux_heads: bool = True

    @classmethod
    def from_config(cls, interlocking: InterlockingConfig, stages: int, aux_heads: bool = True) -> HeadPlacement:
        """What a configuration means on ``stages`` stages; ``aux_heads``: whether there are heads at all."""
        return cls(stages, borrowed_layers(interlocking) if aux_heads else 0, aux_heads)

    def home(self, loss: int) -> int:
        """The stage that has the head of a loss and computes it."""
        return loss + 1 if self.borrow and loss < self.stages - 1 else loss

    def losses_at(self, stage: int) -> list[int]:
        """The losses that a stage computes, in that order (two on the last stage with borrowed layers)."""
        return [loss for loss in self.reported_at(stage) if self.aux_heads or loss == self.stages - 1]

    def reported_at(self, stage: int) -> list[int]:
        """The losses that a stage reports: those it computes, and those that nobody does (NaN)."""
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
            loss: 0 … K-2.
            bounds: K+1 numbers; stage k has layers bounds[k] … bounds[k+1]-1.
        """
        return bounds[loss + 1] + self.borrow

    def boundaries(self, bounds: Sequence[int]) -> dict[int, int]:
        """Of all auxiliary heads: the layer before which one stands → the stage that has it."""
        if not self.aux_heads:
            return {}
        return {self.boundary(loss, bounds): self.home(loss) for loss in range(self.stages - 1)}


def borrowed_layers(interlocking: InterlockingConfig) -> int:
    """How many layers of the next stage a head stands behind."""
    return interlocking.aux_head.borrow if interlocking.aux_head is not None else 0
