"""What a strategy means on one stage, worked out once: the engine asks at every instruction."""

from __future__ import annotations

from dataclasses import dataclass

from ibp_deepspeed.strategy.strategy import Strategy


@dataclass(frozen=True)
class StageStrategy:
    """The answers of :class:`Strategy` for the micro-batches of stage k.

    Attributes:
        waits: whether the update gradient comes from another stage.
        computes_losses: whether a loss is computed here.
        sends_gradients: whether any gradient goes to the stage before.
        product_follows: whether a loss that is computed here goes upstream at once.
        used: the losses that train some trunk.
        crosses: the losses whose gradient goes to the stage before.
        reach: the furthest loss that trains trunk k.
        weights: loss index → its weight in the gradient of trunk k.
        update_gives_input_gradient: see :meth:`Strategy.update_gives_input_gradient`.
        borrowed_share: see :meth:`Strategy.borrowed_share`.
    """

    waits: bool
    computes_losses: bool
    sends_gradients: bool
    product_follows: bool
    used: frozenset[int]
    crosses: frozenset[int]
    reach: int
    weights: dict[int, float]
    update_gives_input_gradient: bool
    borrowed_share: float

    @classmethod
    def of(cls, strategy: Strategy, stage: int) -> StageStrategy:
        """The table of stage ``stage``."""
        losses = strategy.losses_at(stage)
        return cls(
            waits=strategy.distance(stage) > 0,
            computes_losses=bool(losses),
            sends_gradients=strategy.sends_gradients(stage),
            product_follows=any(strategy.crosses(loss, stage) for loss in losses),
            used=frozenset(loss for loss in range(strategy.stages) if len(strategy.users(loss))),
            crosses=frozenset(loss for loss in range(strategy.stages) if strategy.crosses(loss, stage)),
            reach=strategy.reach(stage),
            weights=strategy.weights(stage),
            update_gives_input_gradient=strategy.update_gives_input_gradient(stage),
            borrowed_share=strategy.borrowed_share(stage),
        )
