"""A loss of a stage's own layers, beside those of the exits: the balance of a router's experts, say.

It is a part of every exit's loss behind it: L_j is the exit's own loss and the side losses of stages 0 … j. So a trunk
gets the gradient that the model up to exit j would have, and no message is needed beyond those of the exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor


class SideLoss(NamedTuple):
    """Of one stage and one micro-batch.

    Attributes:
        name: in reports.
        value: as it is reported, a scalar with its graph.
        factor: of the value in the exits' losses.
    """

    name: str
    value: Tensor
    factor: float


MakeSideLoss = Callable[[Iterable[Any]], SideLoss | None]
"""(a stage's layers, right after their forward pass) → what they add to the losses; None: nothing."""
