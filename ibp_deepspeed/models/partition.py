"""Contiguous partitions of layers into stages whose largest stage is smallest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import inf

from ibp_deepspeed.models.errors import ModelError

Extra = int | Callable[[int, int], int]
"""A cost of a stage on top of its units: a number, or that of a stage with units m … n-1, from m and n."""


def balanced_sizes(costs: Sequence[int], extra: Sequence[Extra]) -> list[int]:
    """Cut units in a row into one non-empty run per stage.

    Among the partitions whose largest stage is smallest, the one with the least sum of squared stage costs is
    returned, which is the most even one.

    Args:
        costs: the cost of every unit.
        extra: a cost that each stage has on top of its units; one entry a stage.

    Returns:
        Units per stage, each at least 1.

    Raises:
        ModelError: more stages than units.
    """
    if len(extra) > len(costs):
        raise ModelError(f"{len(extra)} stages cannot share {len(costs)} layers: every stage needs one")
    bound = _best(costs, extra, lambda so_far, stage: max(so_far, stage))[0]
    return _best(costs, extra, lambda so_far, stage: inf if stage > bound else so_far + stage * stage)[1]


def sizes_to_bounds(sizes: Sequence[int]) -> list[int]:
    """Decoder layers per stage → bounds into [embedding, decoder layers, head]; the ends go to the outer stages."""
    bounds = [0, *(1 + total for total in accumulate(sizes))]
    bounds[-1] += 1
    return bounds


def manual_bounds(
    manual: Sequence[int], num_stages: int, decoder_layers: int, called: str = "decoder layers"
) -> list[int]:
    """Bounds for a partition given by hand.

    Args:
        manual: ``num_stages`` numbers of decoder layers, or ``num_stages + 1`` bounds into the
            ``decoder_layers + 2`` layers [embedding, decoder layers, head].
        called: what the layers between the first and the last one are called in a message.

    Raises:
        ModelError: it is neither.
    """
    sizes = list(manual)
    if len(sizes) == num_stages and min(sizes) >= 1 and sum(sizes) == decoder_layers:
        return sizes_to_bounds(sizes)
    rises = all(low < high for low, high in zip(sizes, sizes[1:], strict=False))
    if len(sizes) == num_stages + 1 and rises and (sizes[0], sizes[-1]) == (0, decoder_layers + 2):
        return sizes
    raise ModelError(
        f"the partition {sizes} does not fit {num_stages} stages of a model with {decoder_layers} {called}: "
        f"give {num_stages} numbers of {called}, each at least 1, with sum {decoder_layers}, "
        f"or {num_stages + 1} rising bounds from 0 to {decoder_layers + 2}"
    )


def _best(
    costs: Sequence[int], extra: Sequence[Extra], combine: Callable[[float, int], float]
) -> tuple[float, list[int]]:
    """Value and sizes of the partition with the least value, folded over stages with ``combine``."""
    ends = [0, *accumulate(costs)]
    # best[n]: the first n units in as many stages as were looked at
    best: list[tuple[float, list[int]]] = [(0, [])] + [(inf, [])] * len(costs)
    for more in extra:
        best = [(inf, [])] + [
            min((combine(best[m][0], ends[n] - ends[m] + _of(more, m, n)), [*best[m][1], n - m]) for m in range(n))
            for n in range(1, len(costs) + 1)
        ]
    return best[-1]


def _of(extra: Extra, first: int, end: int) -> int:
    return extra(first, end) if callable(extra) else extra


def check_next_stages(copied: int, exits: Sequence[int], bounds: Sequence[int]) -> None:
    """That the stage behind each of these exits has as many decoder layers as its head has copies of.

    Raises:
        ModelError: it has fewer.
    """
    last = len(bounds) - 2
    for stage in (loss + 1 for loss in exits):
        there = bounds[stage + 1] - bounds[stage] - (stage == last)  # norm and LM head are no decoder layer
        if there < copied:
            raise ModelError(
                f'"aux_head.objective" momentum copies {copied} decoder layers of the next stage, stage {stage} has '
                f'{there}: use fewer stages, or "layers": {there}.'
            )
