"""Few cases in the place of all: each pair of values of two axes occurs, as most mistakes need no more than that."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

Row = tuple[Any, ...]


def cases(*axes: Iterable[Any], full: bool, always: Sequence[Row] = ()) -> list[Row]:
    """The whole product of the axes, or so few of its rows that each pair of values is in one of them.

    Args:
        always: rows that have to be among the few.
    """
    rows = list(itertools.product(*axes))
    return rows if full else _pairwise(rows, always)


def _pairwise(rows: list[Row], always: Sequence[Row]) -> list[Row]:
    """Greedily: time and again the first of the rows that have the most pairs that are still missing."""
    chosen = list(always)
    missing = {pair for row in rows for pair in _pairs(row)}.difference(*map(_pairs, chosen))
    while missing:
        best = max(rows, key=lambda row: len(_pairs(row) & missing))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(row: Row) -> set[tuple[int, Any, int, Any]]:
    """Two places and what is in them; values are told apart by their text, so that they may be dictionaries."""
    places = itertools.combinations(enumerate(map(repr, row)), 2)
    return {(i, a, j, b) for (i, a), (j, b) in places}
