"""Documents packed into windows: no label lost, none of another document, and little padding."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibp_deepspeed.data.packing import Packing, best_fit
from ibp_deepspeed.data.samples import IGNORED, PackedWindows
from tests.prepared_data import UNHURRIED, document_file

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def bounds(lengths: list[int]) -> np.ndarray:
    return np.append(0, np.cumsum(lengths))


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """By its definition, one item after the other: how full each bin is."""
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, full in enumerate(bins) if full + length <= capacity]
        if fitting:
            bins[max(fitting, key=lambda i: bins[i])] += length
        else:
            bins.append(length)
    return sorted(bins)


@given(LENGTHS)
@UNHURRIED
def test_bins_are_those_of_best_fit_decreasing(lengths: list[int]) -> None:
    bins = best_fit(np.array(lengths), 40)
    assert sorted(np.bincount(bins, weights=lengths).astype(int).tolist()) == plain_best_fit(lengths, 40)


@given(LENGTHS, st.integers(1, 16))
@UNHURRIED
def test_every_token_but_the_first_is_a_label_once_and_behind_its_document(lengths: list[int], length: int) -> None:
    windows = PackedWindows(document_file(lengths), length)  # token t of the file is t
    edges = bounds(lengths)
    every = np.arange(len(windows))
    inputs, labels = windows.take(every)
    positions = windows.positions(every)
    counted = labels != IGNORED
    assert sorted(labels[counted].tolist()) == sorted(set(range(edges[-1])) - set(edges[:-1].tolist()))
    assert (labels[counted] == inputs[counted] + 1).all()
    document = np.searchsorted(edges, inputs, side="right")
    assert (np.searchsorted(edges, labels, side="right") == document)[counted].all(), "of the same document"
    pieces = np.cumsum(np.diff(positions, axis=1, prepend=-1) != 1, axis=1)
    for row in every:
        for piece in np.unique(pieces[row][counted[row]]):
            inside = (pieces[row] == piece) & counted[row]
            assert len(set(document[row][inside])) == 1, "one document a piece"
            first = inputs[row][inside][0] - edges[document[row][inside][0] - 1]
            assert first % length == 0, "a document begins, or goes on behind whole windows"
            assert positions[row][inside].tolist() == list(range(int(inside.sum())))
    assert (np.diff(counted.astype(int), axis=1) <= 0).all(), "padding is on the right"
    assert windows.packing.filled(every).tolist() == counted.sum(1).tolist()
    assert windows.packing.padding == pytest.approx(1 - counted.mean() if len(every) else 0)


@given(LENGTHS, st.integers(1, 16))
@UNHURRIED
def test_windows_are_in_the_order_of_the_file(lengths: list[int], length: int) -> None:
    packing = Packing.of(bounds(lengths), length)
    firsts = packing.starts[packing.firsts[:-1]]
    assert (np.diff(firsts) > 0).all()


def test_a_million_documents_are_packed_in_seconds_with_hardly_any_padding() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 1_000_000).astype(np.int64) + 2
    began = time.perf_counter()
    packing = Packing.of(np.append(0, np.cumsum(lengths)), 1024)
    assert time.perf_counter() - began < 20
    assert packing.padding < 0.001
    assert int(packing.lengths.sum()) == int((lengths - 1).sum())
