"""Which losses train which trunk, what crosses which boundary, and how much is in flight.

The one place where the mathematics of interlocking backpropagation (Gomez et al., JMLR 2022, section 3)
becomes numbers. Schedule, engine, reference and tests ask it; none of them works it out again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ibp_deepspeed.config.interlocking import InterlockingConfig, Mode
from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.strategy.head_placement import HeadPlacement, borrowed_layers


@dataclass(frozen=True)
class Strategy:
    """Interlocking of ``width`` N over ``stages`` K.

    Attributes:
        stages: K, the number of pipeline stages.
        width: N: 1 is local learning, 2 pairwise, N ≥ K ordinary backpropagation.
        mode: ``furthest``: trunk k is trained by the loss of stage reach(k) alone; ``window``: by the weighted
            sum of the losses of stages k … reach(k).
        hop_slack: slots that a gradient may take beyond one for each stage it travels.
        window_weights: N weights of the losses of stages k, k+1, … (None: equal, summing to 1).
        aux_heads: whether stages before the last have a loss of their own.
        borrow: q: the loss of stage k < K-1 stands behind the first q layers of stage k+1, and is computed there.
    """

    stages: int
    width: int
    mode: Mode = "furthest"
    hop_slack: int = 0
    window_weights: tuple[float, ...] | None = None
    aux_heads: bool = True
    borrow: int = 0

    def __post_init__(self) -> None:
        if self.stages < 1 or self.width < 1 or self.hop_slack < 0:
            raise ValueError(f"stages and width must be at least 1 and hop_slack at least 0: {self}")
        if self.mode not in ("furthest", "window"):
            raise ValueError(f"mode must be furthest or window, not {self.mode!r}")
        if not self.aux_heads and not self.is_backpropagation:
            raise ValueError(
                f"only backpropagation (width >= stages, mode furthest) works without heads, not width {self.width} "
                f"of {self.stages} stages in mode {self.mode}"
            )

    @classmethod
    def from_config(cls, interlocking: InterlockingConfig, stages: int, aux_heads: bool = True) -> Strategy:
        """The strategy that a configuration means on ``stages`` stages."""
        weights, borrow = interlocking.window_weights, borrowed_layers(interlocking)
        return cls(
            stages,
            interlocking.width_for(stages),
            interlocking.mode,
            interlocking.hop_slack,
            weights,
            aux_heads,
            borrow,
        )

    @property
    def is_backpropagation(self) -> bool:
        """Whether every trunk is trained by the last loss alone."""
        return self.width >= self.stages and self.mode == "furthest"

    @property
    def hop_slots(self) -> int:
        """Slots between a gradient's use on one stage and on the stage before it."""
        return 1 + self.hop_slack

    def reach(self, stage: int) -> int:
        """The furthest stage whose loss trains trunk ``stage``."""
        return min(stage + self.width - 1, self.stages - 1)

    @cached_property
    def placement(self) -> HeadPlacement:
        """Where the losses stand."""
        return HeadPlacement(self.stages, self.borrow if self.aux_heads else 0, self.aux_heads)

    def distance(self, stage: int) -> int:
        """home(reach(k)) - k: how many boundaries the update gradient of trunk k crosses."""
        return self.placement.home(self.reach(stage)) - stage

    def weights(self, stage: int) -> dict[int, float]:
        """Loss index → its weight in the gradient of trunk ``stage``.

        Near the last stage given weights are cut and rescaled to keep their sum.
        """
        reach = self.reach(stage)
        if self.mode == "furthest":
            return {reach: 1.0}
        count = reach - stage + 1
        if self.window_weights is None:
            return {loss: 1.0 / count for loss in range(stage, reach + 1)}
        kept = self.window_weights[:count]
        scale = sum(self.window_weights) / sum(kept)
        return {stage + i: weight * scale for i, weight in enumerate(kept)}

    def users(self, loss: int) -> range:
        """The trunks that loss ``loss`` trains (contiguous, empty if there is none)."""
        first = loss - self.width + 1
        if self.mode == "window" or loss == self.stages - 1:
            return range(max(0, first), loss + 1)
        return range(first, first + 1) if first >= 0 else range(0)

    def crosses(self, loss: int, stage: int) -> bool:
        """Whether dL_loss/dh travels from ``stage`` to ``stage`` - 1: only if a trunk before ``stage`` uses it."""
        users = self.users(loss)
        return stage <= self.placement.home(loss) and len(users) > 0 and users[0] < stage

    def sends_gradients(self, stage: int) -> bool:
        """Whether ``stage`` sends any gradient to the stage before it."""
        return any(self.crosses(loss, stage) for loss in range(self.stages))

    def borrowed_share(self, stage: int) -> float:
        """Weight of the loss of the stage before in the gradient of the first layers of ``stage``, where it stands.

        In mode window it is one more in the mean of the trunk's n losses, 1/(n+1); 0: it does not train them.
        """
        if not (self.borrow and self.aux_heads and self.mode == "window" and stage > 0):
            return 0.0
        return 1.0 / (len(self.weights(stage)) + 1)

    def update_gives_input_gradient(self, stage: int) -> bool:
        """Whether the update's backward pass of ``stage`` also yields the gradient that goes upstream.

        It does when the whole trunk is trained by one loss; a weighted sum of several needs an input gradient of its
        own for the last of them, because what travels is the gradient of one loss, unweighted.
        """
        one_loss = len(self.weights(stage)) == 1 and not self.borrowed_share(stage)
        return one_loss and self.crosses(self.reach(stage), stage)

    def most_in_flight(self, stage: int, micro_batches: int) -> int:
        """The most micro-batches whose activations ``stage`` holds at once."""
        return min(micro_batches, self.distance(stage) * self.hop_slots + 1)

    def channel_depth(self, micro_batches: int, requested: int | None = None) -> int:
        """Micro-batches that a stage may run ahead of what the next stage has received (default 2M).

        Raises:
            ConfigError: the requested depth is below what the schedule keeps in flight.
        """
        least = self.most_in_flight(0, micro_batches)
        if requested is None:
            return max(2 * micro_batches, self.distance(0) * self.hop_slots + 1)
        if requested < least:
            raise ConfigError(
                f'"interlocking.channel_depth" is {requested}, the least for width {self.width} with hop_slack '
                f"{self.hop_slack} on {self.stages} stages is {least}."
            )
        return requested


@dataclass(frozen=True)
class StageStrategy:
    """The answers of :class:`Strategy` on stage k, worked out once: the engine asks at every instruction.

    Attributes:
        stage: k.
        is_last: whether it ends in the model's own loss.
        waits: whether the update gradient comes from another stage.
        computes_losses: whether a loss is computed here.
        sends_gradients: whether any gradient goes to the stage before.
        input_gradient_follows: whether a loss that is computed here goes upstream at once.
        used: the losses that train some trunk.
        crosses: the losses whose gradient goes to the stage before.
        reach: the furthest loss that trains trunk k.
        weights: loss index → its weight in the gradient of trunk k.
        update_gives_input_gradient: see :meth:`Strategy.update_gives_input_gradient`.
        borrowed_share: see :meth:`Strategy.borrowed_share`.
    """

    stage: int
    is_last: bool
    waits: bool
    computes_losses: bool
    sends_gradients: bool
    input_gradient_follows: bool
    used: frozenset[int]
    crosses: frozenset[int]
    reach: int
    weights: dict[int, float]
    update_gives_input_gradient: bool
    borrowed_share: float

    @classmethod
    def of(cls, strategy: Strategy, stage: int) -> StageStrategy:
        """The table of stage ``stage``."""
        losses = strategy.placement.losses_at(stage)
        return cls(
            stage=stage,
            is_last=stage == strategy.stages - 1,
            waits=strategy.distance(stage) > 0,
            computes_losses=bool(losses),
            sends_gradients=strategy.sends_gradients(stage),
            input_gradient_follows=any(strategy.crosses(loss, stage) for loss in losses),
            used=frozenset(loss for loss in range(strategy.stages) if len(strategy.users(loss))),
            crosses=frozenset(loss for loss in range(strategy.stages) if strategy.crosses(loss, stage)),
            reach=strategy.reach(stage),
            weights=strategy.weights(stage),
            update_gives_input_gradient=strategy.update_gives_input_gradient(stage),
            borrowed_share=strategy.borrowed_share(stage),
        )
