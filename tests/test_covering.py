"""The thinned matrices of other tests."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests import covering
from tests.prepared_data import UNHURRIED


@UNHURRIED
@given(st.lists(st.integers(1, 3), min_size=2, max_size=4))
def test_each_pair_of_values_is_in_a_row(sizes: list[int]) -> None:
    axes = [range(size) for size in sizes]
    rows = covering.cases(*axes, full=False)
    for i, j in itertools.combinations(range(len(axes)), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(axes[i], axes[j]))
    assert len(rows) <= len(covering.cases(*axes, full=True)) == len(list(itertools.product(*axes)))


def test_some_rows_are_always_there() -> None:
    last = ({"mode": "window"}, 3)
    assert last in covering.cases([{}, {"mode": "window"}], range(4), full=False, always=[last])
