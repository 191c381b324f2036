"""Which losses train which trunk, what crosses which boundary, and how much is live.

The one place where the mathematics of interlocking backpropagation (Gomez et al., JMLR 2022, section 3)
becomes numbers. Schedule, engine, reference and tests ask it; none of them works it out again.
"""

from __future__ import annotations

from dataclasses import dataclass

from ibp_deepspeed.config.interlocking import ConfigError, InterlockingConfig, Mode


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
        borrow: whether the loss of stage k < K-1 stands behind the first layers of stage k+1, and is computed there.
    """

    stages: int
    width: int
    mode: Mode = "furthest"
    hop_slack: int = 0
    window_weights: tuple[float, ...] | None = None
    aux_heads: bool = True
    borrow: bool = False

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
    def from_config(cls, config: InterlockingConfig, stages: int, aux_heads: bool = True) -> Strategy:
        """The strategy that a configuration means on ``stages`` stages."""
        weights, borrow = config.window_weights, borrows(config)
        return cls(stages, config.width_for(stages), config.mode, config.hop_slack, weights, aux_heads, borrow)

    @property
    def is_backpropagation(self) -> bool:
        """Whether every trunk is trained by the last loss alone."""
        return self.width >= self.stages and self.mode == "furthest"

    @property
    def hop(self) -> int:
        """Slots between a gradient's use on one stage and on the stage before it."""
        return 1 + self.hop_slack

    def reach(self, stage: int) -> int:
        """The furthest stage whose loss trains trunk ``stage``."""
        return min(stage + self.width - 1, self.stages - 1)

    def home(self, loss: int) -> int:
        """The stage that computes loss ``loss``: its own, or the next one with borrowed layers."""
        return loss + 1 if self.borrow and loss < self.stages - 1 else loss

    def losses_at(self, stage: int) -> list[int]:
        """The losses that a stage computes, in that order (two on the last stage with borrowed layers)."""
        losses = range(self.stages) if self.aux_heads else range(self.stages - 1, self.stages)
        return [loss for loss in losses if self.home(loss) == stage]

    def distance(self, stage: int) -> int:
        """home(reach(k)) - k: how many boundaries the update gradient of trunk k crosses."""
        return self.home(self.reach(stage)) - stage

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
        return stage <= self.home(loss) and len(users) > 0 and users[0] < stage

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

        It does when the whole trunk is trained by one loss; a weighted sum of several needs a product of its own for
        the last of them, because what travels is the gradient of one loss, unweighted.
        """
        one_loss = len(self.weights(stage)) == 1 and not self.borrowed_share(stage)
        return one_loss and self.crosses(self.reach(stage), stage)

    def live_micro_batches(self, stage: int, micro_batches: int) -> int:
        """The most micro-batches whose activations ``stage`` holds at once."""
        return min(micro_batches, self.distance(stage) * self.hop + 1)

    def channel_depth(self, micro_batches: int, requested: int | None = None) -> int:
        """Micro-batches that a stage may run ahead of what the next stage has received (default 2M).

        Raises:
            ConfigError: the requested depth is below what the schedule keeps live.
        """
        least = self.live_micro_batches(0, micro_batches)
        if requested is None:
            return max(2 * micro_batches, self.distance(0) * self.hop + 1)
        if requested < least:
            raise ConfigError(
                f'"interlocking.channel_depth" is {requested}, the least for width {self.width} with hop_slack '
                f"{self.hop_slack} on {self.stages} stages is {least}."
            )
        return requested


def borrows(config: InterlockingConfig) -> bool:
    """Whether heads stand behind layers of the next stage."""
    return config.aux_head is not None and config.aux_head.borrow > 0
