"""A mixture: shares by weight, the same for a seed wherever and whenever it is read, and nothing of a source lost."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ibp_deepspeed.data import DataError, HeldOut, TokenFile
from ibp_deepspeed.data.joined import Joined, joined_entropy
from ibp_deepspeed.data.mixture import BLOCK, MixtureLoader
from tests.prepared_data import UNHURRIED, document_file, token_file

LENGTH = 4
NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[TokenFile]:
    """Documents packed and masked, a text without bounds, and packed ones again; all of one tokenizer."""
    folder = tmp_path_factory.mktemp("sources")
    made = [document_file([3, 9, 2, 5] * 6), token_file(np.arange(40)), document_file([6] * 3)]
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "none").write_text("tokenizer")
    return [dataclasses.replace(file, path=folder / name / "train.bin") for name, file in zip(NAMES, made, strict=True)]


def loader(files: list[TokenFile], size: int = 2, weights: Any = (0.5, 0.3, 0.2), **more: Any) -> MixtureLoader:
    return MixtureLoader(files, weights, NAMES, LENGTH, size, **more)


def same(one: Any, two: Any) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@given(weights=st.tuples(*[st.floats(0.001, 1)] * 3), blocks=st.integers(1, 3))
@UNHURRIED
def test_every_block_has_its_shares_within_one_sample(
    files: list[TokenFile], weights: tuple[float, ...], blocks: int
) -> None:
    mixture = loader(files, size=BLOCK, weights=weights)
    ids = np.array(mixture.sample_ids(0, blocks))
    counts = np.bincount(mixture.samples.part_of(ids), minlength=3)
    assert (abs(counts - np.array(weights) / sum(weights) * BLOCK * blocks) < 1).all()


def test_every_epoch_of_a_source_has_each_of_its_samples_once(files: list[TokenFile]) -> None:
    mixture = loader(files, size=1)
    ids = np.array(mixture.sample_ids(0, 500))
    parts = mixture.samples.part_of(ids)
    for part, samples in enumerate(mixture.samples.parts):
        mine = ids[parts == part] - mixture.samples.offsets[part]
        whole = [mine[i : i + len(samples)] for i in range(0, len(mine) - len(samples) + 1, len(samples))]
        assert whole and all(sorted(epoch.tolist()) == list(range(len(samples))) for epoch in whole)
        assert len({tuple(epoch.tolist()) for epoch in whole}) > 1, "another order in every epoch"


@given(start=st.integers(0, 3000), size=st.integers(1, 3), ranks=st.integers(1, 3), seed=st.integers(0, 3))
@UNHURRIED
def test_a_sample_follows_from_seed_and_number_alone(
    files: list[TokenFile], start: int, size: int, ranks: int, seed: int
) -> None:
    """However it is divided among replicas, and wherever it begins; the state goes over to other sizes."""
    parts = [
        loader(files, size, seed=seed, start=start, data_parallel_rank=rank, data_parallel_size=ranks)
        for rank in range(ranks)
    ]
    ids = [
        i for rows in zip(*(islice(part, 3) for part in parts), strict=True) for row in rows for i in row[2].tolist()
    ]
    alone = loader(files, 1, seed=seed)
    alone.load_state_dict(loader(files, size, seed=seed, start=start, data_parallel_size=ranks).state_dict())
    assert ids == [int(row[2]) for row in islice(alone, len(ids))]
    assert parts[0].sample_ids(3, 3) == ids
    other = loader(files, 1, seed=seed + 1, start=start * size * ranks)
    assert len(ids) < 6 or ids != [int(row[2]) for row in islice(other, len(ids))]


def test_rows_are_those_of_their_source_and_positions_come_with_them(files: list[TokenFile]) -> None:
    mixture, seen = loader(files, 3), Counter[int]()
    for inputs, labels, ids, *positions in islice(mixture, 20):
        for row, i in enumerate(ids.numpy()):
            part = int(mixture.samples.part_of(np.array([i]))[0])
            own = np.array([i - mixture.samples.offsets[part]])
            want = mixture.samples.parts[part].take(own)
            assert inputs[row].tolist() == want[0][0].tolist() and labels[row].tolist() == want[1][0].tolist()
            inside = mixture.samples.parts[part].positions(own)
            expected = list(range(LENGTH)) if inside is None else inside[0].tolist()
            assert (positions[0][row].tolist() if positions else list(range(LENGTH))) == expected
            seen[part] += 1
    assert set(seen) == {0, 1, 2}


def test_tokens_that_were_drawn_are_counted_by_source(files: list[TokenFile]) -> None:
    mixture = loader(files, 2, data_parallel_rank=1, data_parallel_size=2)
    rows = list(islice(mixture, 5))
    drawn = mixture.drawn(5, 5)
    everything = np.array(mixture.sample_ids(5, 5))
    assert list(drawn) == NAMES and sum(drawn.values()) == int(mixture.samples.filled(everything).sum())
    assert len(rows) == 5 and drawn["b"] == LENGTH * int((mixture.samples.part_of(everything) == 1).sum())


def test_an_evaluation_reads_all_sources_each_sample_once(files: list[TokenFile]) -> None:
    held_out = HeldOut(files, LENGTH, 4)
    assert held_out.available == len(Joined(files, LENGTH, None))
    assert held_out.describe().endswith("documents apart")
    counted = sum(int((labels != -100).sum()) for _, labels, *_ in held_out)
    assert counted == held_out.tokens
    assert joined_entropy(files) == 0.0


def test_what_can_not_be_mixed_is_refused(files: list[TokenFile], tmp_path: Path) -> None:
    (tmp_path / "none").write_text("another")
    other = dataclasses.replace(files[1], path=tmp_path / "train.bin")
    with pytest.raises(DataError, match=f"{tmp_path} was made with another tokenizer than .*a: prepare it again with"):
        loader([files[0], other, files[2]])
    for weights, said in (
        ((0.5, 0.0, 0.5), "the weight of b is 0.0: give a positive number"),
        ((0.5, float("nan"), 0.5), "the weight of b is nan"),
        ((1.0, 1.0, 1e-5), "c has a share of 5e-06 in the mixture: give it 1/4096 or more"),
    ):
        with pytest.raises(DataError, match=said):
            loader(files, weights=weights)
    with pytest.raises(DataError, match="the state of a mixture is {}, it has the number samples"):
        loader(files).load_state_dict({})
