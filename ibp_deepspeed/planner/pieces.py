"""How often a stage computes each piece of its work for a micro-batch, and what that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ibp_deepspeed.schedule.simulator import Costs
from ibp_deepspeed.strategy.strategy import Strategy


@dataclass(frozen=True)
class Pieces:
    """Of one stage and one micro-batch; F is once, and W where there is something to train.

    Attributes:
        input_gradients: B.
        heads: auxiliary ones.
        borrowed_gradients: input gradients through borrowed layers.
        at_once: whether B and W of the update are one piece.
        trains: whether there is an update.
    """

    input_gradients: int
    heads: int
    borrowed_gradients: int
    at_once: bool
    trains: bool

    def time(self, costs: Costs) -> float:
        """In the unit of the costs."""
        of_b = self.input_gradients * costs.input_gradient + self.borrowed_gradients * costs.borrowed_gradient
        of_w = self.trains * costs.weight_gradient + self.at_once * costs.at_once
        return costs.forward + of_b + of_w + self.heads * costs.head


def crossings(strategy: Strategy) -> list[int]:
    """How many gradients of a micro-batch each stage sends to the one before."""
    changes = [0] * (strategy.stages + 1)
    losses = strategy.placement.losses
    for loss in losses[-1:] if strategy.mode == "sum" else losses:
        users = strategy.users(loss)
        if users:  # it crosses from its home up to the first trunk that uses it
            changes[users[0] + 1] += 1
            changes[strategy.placement.home(loss) + 1] -= 1
    return list(accumulate(changes[:-1]))


def pieces(strategy: Strategy) -> list[Pieces]:
    """Of each stage; what the schedule's instructions add up to (tests/planner/test_pieces.py)."""
    return [_of_stage(strategy, k, crossing) for k, crossing in enumerate(crossings(strategy))]


def _of_stage(strategy: Strategy, stage: int, crossing: int) -> Pieces:
    here = strategy.placement.losses_at(stage)
    borrowed = sum(loss < stage and strategy.crosses(loss, stage) for loss in here)
    heads = sum(loss < strategy.stages - 1 for loss in here)
    if not strategy.trains(stage):
        return Pieces(crossing - borrowed, heads, borrowed, at_once=False, trains=False)
    # The update computes one; if that is what goes upstream, it is not computed again.
    own = strategy.crosses(strategy.reach(stage), stage) and strategy.update_gives_input_gradient(stage)
    return Pieces(1 + crossing - borrowed - own, heads, borrowed, not strategy.splits(stage), trains=True)


def works(strategy: Strategy, costs: Sequence[Costs]) -> list[float]:
    """Time that each stage computes for a micro-batch."""
    return [piece.time(cost) for piece, cost in zip(pieces(strategy), costs, strict=True)]
