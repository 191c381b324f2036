"""Which losses train which trunk, what crosses which boundary, and how much is in flight.

The one place where the mathematics of interlocking backpropagation (Gomez et al., JMLR 2022, section 3)
becomes numbers. Schedule, engine, reference and tests ask it; none of them works it out again.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

from ibp_deepspeed.config.interlocking import Mode
from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.strategy.head_placement import HeadPlacement


@dataclass(frozen=True)
class Strategy:
    """Interlocking of ``width`` N over ``stages`` K.

    Attributes:
        stages: K, the number of pipeline stages.
        width: N, counted in exits: 1 is local learning, 2 pairwise; as many as there are is backpropagation.
        mode: ``furthest``: trunk k is trained by the loss of exit reach(k) alone; ``window``: by the weighted
            sum of the losses of the next N exits; ``sum``: by that of all exits behind it (N = K), which travels as one
            gradient.
        hop_slack: slots that a gradient may take beyond one for each stage it travels.
        window_weights: N weights of the losses of the next exits (None: equal, summing to 1).
        borrow: q: the loss of stage k < K-1 stands behind the first q layers of stage k+1, and is computed there.
        exits: the stages that have a loss, rising; the last one always has (None: all have).
        exit_weights: in mode sum a weight for each exit (None: equal, summing to 1).
        split_backward: whether an update whose input gradient goes upstream computes and sends that first (B), and its
            weight gradients later (W).
        frozen: the stages whose trunk has nothing to train, rising. They pass on the gradients that trunks before them
            use, and none where there is no such trunk.
    """

    stages: int
    width: int
    mode: Mode = "furthest"
    hop_slack: int = 0
    window_weights: tuple[float, ...] | None = None
    borrow: int = 0
    exits: tuple[int, ...] | None = None
    exit_weights: tuple[float, ...] | None = None
    split_backward: bool = True
    frozen: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.stages < 1 or self.width < 1 or self.hop_slack < 0:
            raise ValueError(f"stages and width must be at least 1 and hop_slack at least 0: {self}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be furthest, window or sum, not {self.mode!r}")
        if self.mode == "sum" and (self.width < self.stages or self.borrow):
            raise ValueError(f"mode sum is for width >= stages, without borrowed layers: {self}")
        if self.exit_weights is not None and len(self.exit_weights) != len(self.placement.losses):
            raise ValueError(
                f"there are {len(self.placement.losses)} exits and {len(self.exit_weights)} weights: {self}"
            )
        if any(not 0 <= stage < self.stages for stage in self.frozen):
            raise ValueError(f"frozen names a stage that is not one of the {self.stages}: {self}")
        object.__setattr__(self, "exits", self.placement.losses)
        object.__setattr__(self, "frozen", tuple(sorted(set(self.frozen))))

    @property
    def is_backpropagation(self) -> bool:
        """Whether every trunk is trained by the last loss alone."""
        return all(self.weights(k) == {self.stages - 1: 1.0} for k in range(self.stages))

    @property
    def is_widest(self) -> bool:
        """Whether the last loss trains the first trunk, so that no stage can be ahead of it."""
        return self.reach(0) == self.stages - 1

    @property
    def hop_slots(self) -> int:
        """Slots between a gradient's use on one stage and on the stage before it."""
        return 1 + self.hop_slack

    @cached_property
    def placement(self) -> HeadPlacement:
        """Where the losses stand."""
        return HeadPlacement(self.stages, self.borrow, self.exits)

    def next_exits(self, stage: int) -> tuple[int, ...]:
        """The next N exits at or behind a stage, or as many as there are."""
        first = bisect_left(self.placement.losses, stage)
        return self.placement.losses[first : first + self.width]

    def reach(self, stage: int) -> int:
        """The furthest exit whose loss trains trunk ``stage``."""
        return self.next_exits(stage)[-1]

    def trains(self, stage: int) -> bool:
        """Whether trunk ``stage`` has something to train."""
        return stage not in self.frozen

    def awaited(self, stage: int) -> int | None:
        """The loss whose gradient goes through trunk ``stage`` last, after which a micro-batch is freed.

        It is reach(k); with nothing to train the furthest loss that a trunk before it uses, None if there is none.
        """
        if self.trains(stage):
            return self.reach(stage)
        passing = [loss for loss in self.placement.losses if loss >= stage and self.crosses(loss, stage)]
        return passing[-1] if passing else None

    def distance(self, stage: int) -> int:
        """home(reach(k)) - k: how many boundaries the update gradient of trunk k crosses; see :meth:`awaited`."""
        awaited = self.awaited(stage)
        return 0 if awaited is None else self.placement.home(awaited) - stage

    def weights(self, stage: int) -> dict[int, float]:
        """Loss index → its weight in the gradient of trunk ``stage``.

        In mode window given weights are cut near the last stage and rescaled to keep their sum.
        """
        exits = self.next_exits(stage)
        if self.mode == "furthest":
            return {exits[-1]: 1.0}
        if self.mode == "sum":
            losses = self.placement.losses
            given = self.exit_weights or (1.0 / len(losses),) * len(losses)
            return {loss: weight for loss, weight in zip(losses, given, strict=True) if loss >= stage}
        if self.window_weights is None:
            return dict.fromkeys(exits, 1.0 / len(exits))
        kept = self.window_weights[: len(exits)]
        scale = sum(self.window_weights) / sum(kept)
        return {loss: weight * scale for loss, weight in zip(exits, kept, strict=True)}

    def terms(self, stage: int) -> dict[int, float]:
        """Index of an output gradient of ``stage`` → its factor in the update gradient of its trunk.

        The weights, but in mode sum: what arrives as the last loss's is the weighted sum of all exits behind. With
        nothing to train: of the gradient that is passed on last.
        """
        awaited = self.awaited(stage)
        if awaited is None:
            return {}
        if self.mode != "sum" and not self.trains(stage):
            return {awaited: 1.0}
        weights = self.weights(stage)
        if self.mode != "sum" or stage == self.stages - 1:
            return weights
        own = {stage: weights[stage]} if stage in weights else {}
        return {**own, self.stages - 1: 1.0}

    def side_weight(self, stage: int) -> float:
        """Factor of a trunk's own side loss in its update, which is a part of each of the losses that train it."""
        return sum(self.weights(stage).values()) if self.trains(stage) or self.mode == "sum" else 1.0

    def users(self, loss: int) -> list[int]:
        """The trunks that loss ``loss`` trains, rising (empty if there is none)."""
        return self._users.get(loss, [])

    @cached_property
    def _users(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for k in filter(self.trains, range(self.stages)):
            for loss in self.weights(k):
                found.setdefault(loss, []).append(k)
        return found

    def crosses(self, loss: int, stage: int) -> bool:
        """Whether dL_loss/dh travels from ``stage`` to ``stage`` - 1: only if a trunk before ``stage`` uses it.

        In mode sum one gradient alone does, in the last loss's name.
        """
        if self.mode == "sum" and loss < self.stages - 1:
            return False
        users = self.users(loss)
        return stage <= self.placement.home(loss) and len(users) > 0 and users[0] < stage

    def sends_gradients(self, stage: int) -> bool:
        """Whether ``stage`` sends any gradient to the stage before it."""
        return any(self.crosses(loss, stage) for loss in self.placement.losses)

    def borrowed_share(self, stage: int) -> float:
        """Weight of the loss of the stage before in the gradient of the first layers of ``stage``, where it stands.

        In mode window it is one more in the mean of the trunk's n losses, 1/(n+1); 0: it does not train them.
        """
        if self.mode != "window" or not self.placement.borrowed_from(stage) or not self.trains(stage):
            return 0.0
        return 1.0 / (len(self.weights(stage)) + 1)

    def update_gives_input_gradient(self, stage: int) -> bool:
        """Whether the update's backward pass of ``stage`` also yields the gradient that goes upstream.

        It does when the whole trunk is trained by one loss, and in mode sum; a window of several needs an input
        gradient of its own for the last of them, because what travels is the gradient of one loss, unweighted.
        """
        if not self.trains(stage):
            return self.awaited(stage) is not None
        whole = self.mode == "sum" or len(self.weights(stage)) == 1 and not self.borrowed_share(stage)
        return whole and self.crosses(self.reach(stage), stage)

    def splits(self, stage: int) -> bool:
        """Whether the update of ``stage`` is made in two steps, B and W."""
        return self.split_backward and self.trains(stage) and self.update_gives_input_gradient(stage)

    @cached_property
    def _furthest_distance(self) -> int:
        return max(self.distance(k) for k in range(self.stages))

    def slots_in_flight(self, stage: int) -> int:
        """The most micro-batches that ``stage`` may hold at once, however many there are.

        Those whose update gradient is on its way, d·hop + 1; where W is put off, up to as many as the stage that has
        most of them holds: what waits for its W is held too.
        """
        furthest = self._furthest_distance if self.splits(stage) else self.distance(stage)
        return furthest * self.hop_slots + 1

    def most_in_flight(self, stage: int, micro_batches: int) -> int:
        """The most micro-batches whose activations ``stage`` holds at once."""
        return min(micro_batches, self.slots_in_flight(stage))

    def channel_depth(self, micro_batches: int, requested: int | None = None) -> int:
        """Micro-batches that a stage may run ahead of what the next stage has received (default 2M).

        Raises:
            ConfigError: the requested depth is below what the schedule keeps in flight.
        """
        most = self._furthest_distance * self.hop_slots + 1
        if requested is None:
            return max(2 * micro_batches, most)
        if requested < min(micro_batches, most):
            raise ConfigError(
                f'"interlocking.channel_depth" is {requested}, the least for width {self.width} with hop_slack '
                f"{self.hop_slack} on {self.stages} stages is {min(micro_batches, most)}."
            )
        return requested


@dataclass(frozen=True)
class StageStrategy:
    """The answers of :class:`Strategy` on stage k, worked out once: the engine asks at every instruction.

    Attributes:
        stage: k.
        is_last: whether it ends in the model's own loss.
        trains: whether its trunk has something to train.
        waits: whether the update gradient comes from another stage.
        computes_losses: whether a loss is computed here.
        sends_gradients: whether any gradient goes to the stage before.
        input_gradient_follows: whether a loss that is computed here goes upstream at once.
        used: the losses that train some trunk, or this stage's borrowed layers.
        crosses: the losses whose gradient goes to the stage before.
        reach: the furthest loss that trains trunk k, or see :meth:`Strategy.awaited`.
        terms: see :meth:`Strategy.terms`.
        input_weight: what the update's input gradient is divided by before it goes upstream: the one loss's weight, 1
            for a weighted sum.
        update_gives_input_gradient: see :meth:`Strategy.update_gives_input_gradient`.
        borrowed_share: see :meth:`Strategy.borrowed_share`.
        side_weight: see :meth:`Strategy.side_weight`.
    """

    stage: int
    is_last: bool
    trains: bool
    waits: bool
    computes_losses: bool
    sends_gradients: bool
    input_gradient_follows: bool
    used: frozenset[int]
    crosses: frozenset[int]
    reach: int
    terms: dict[int, float]
    input_weight: float
    update_gives_input_gradient: bool
    borrowed_share: float
    side_weight: float

    @classmethod
    def of(cls, strategy: Strategy, stage: int) -> StageStrategy:
        """The table of stage ``stage``."""
        losses, awaited = strategy.placement.losses_at(stage), strategy.awaited(stage)
        reach = strategy.reach(stage) if awaited is None else awaited
        borrowing = losses[:1] if strategy.borrowed_share(stage) else []
        one_loss = strategy.mode != "sum" and strategy.trains(stage)
        return cls(
            stage=stage,
            is_last=stage == strategy.stages - 1,
            trains=strategy.trains(stage),
            waits=strategy.distance(stage) > 0,
            computes_losses=bool(losses),
            sends_gradients=strategy.sends_gradients(stage),
            input_gradient_follows=any(strategy.crosses(loss, stage) for loss in losses),
            used=frozenset(loss for loss in strategy.placement.losses if strategy.users(loss) or loss in borrowing),
            crosses=frozenset(loss for loss in strategy.placement.losses if strategy.crosses(loss, stage)),
            reach=reach,
            terms=strategy.terms(stage),
            input_weight=strategy.weights(stage).get(reach, 1.0) if one_loss else 1.0,
            update_gives_input_gradient=strategy.update_gives_input_gradient(stage),
            borrowed_share=strategy.borrowed_share(stage),
            side_weight=strategy.side_weight(stage),
        )
