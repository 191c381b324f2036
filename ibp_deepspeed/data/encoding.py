"""Documents to tokens, in this process or in several, in the order of the documents whatever their number."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ibp_deepspeed.errors import DataError

# A batch that a tokenizer encodes at once ends at either limit, so that memory stays small.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 22
# So many are encoded here before other processes are started, which takes them seconds.
BATCHES_ALONE = 16
_AHEAD = 2  # batches for each worker that are read ahead

Split = TypeVar("Split", bound=str)


class Row(NamedTuple):
    """The token ids of one document, and which of them count in the loss (None: a text, where all do)."""

    ids: list[int]
    counts: list[bool] | None = None


class Encoded(NamedTuple, Generic[Split]):
    """Documents of one split, one after the other.

    Attributes:
        split: theirs.
        tokens: their ids. Shape [tokens].
        lengths: tokens of each. Shape [documents].
        counts: which tokens count in the loss; None: a text, where all do. Shape [tokens].
    """

    split: Split
    tokens: npt.NDArray[np.unsignedinteger[Any]]
    lengths: npt.NDArray[np.int64]
    counts: npt.NDArray[np.bool_] | None


def encoded(
    documents: Iterable[tuple[Split, Any]], encoder: Any, dtype: np.dtype[Any], workers: int
) -> Iterator[Encoded[Split]]:
    """All documents, in their order.

    Args:
        documents: with their splits.
        encoder: an :class:`ibp_deepspeed.data.token_file.Encoder`; with workers it is pickled.
        dtype: of the tokens.
        workers: processes; with one everything is done here.

    Raises:
        DataError: a worker has died; and what the encoder raises.
    """
    batches = _batches(documents)
    for batch in batches if workers == 1 else islice(batches, BATCHES_ALONE):
        yield from _encode(batch, encoder, dtype)
    first = next(batches, None)
    if first is not None:
        yield from _by_workers(first, batches, (encoder, dtype), workers)


def _by_workers(
    first: list[tuple[Split, Any]], batches: Iterator[list[tuple[Split, Any]]], how: tuple[Any, Any], workers: int
) -> Iterator[Encoded[Split]]:
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks
    with ProcessPoolExecutor(workers, context, _begin, how) as pool:
        waiting: deque[Future[list[Encoded[Split]]]] = deque([pool.submit(_work, first)])
        try:
            while waiting:
                waiting.extend(pool.submit(_work, batch) for batch in islice(batches, _AHEAD * workers - len(waiting)))
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that encodes text has died, perhaps for want of memory: give fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_HOW: tuple[Any, Any]
"""In a worker: the encoder and the type of tokens."""


def _begin(*how: Any) -> None:
    global _HOW
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one of many already
    _HOW = how[0], how[1]


def _work(batch: list[tuple[Split, Any]]) -> list[Encoded[Split]]:
    return list(_encode(batch, *_HOW))


def _encode(batch: list[tuple[Split, Any]], encoder: Any, dtype: np.dtype[Any]) -> Iterator[Encoded[Split]]:
    for split in dict.fromkeys(split for split, _ in batch):
        rows: list[Row] = encoder.rows([document for where, document in batch if where == split])
        tokens = np.concatenate([np.array(row.ids, dtype=dtype) for row in rows])
        lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
        counts = None
        if rows[0].counts is not None:
            counts = np.concatenate([np.array(row.counts, dtype=np.bool_) for row in rows])
        yield Encoded(split, tokens, lengths, counts)


def _batches(documents: Iterable[tuple[Split, Any]]) -> Iterator[list[tuple[Split, Any]]]:
    batch: list[tuple[Split, Any]] = []
    characters = 0
    for split, document in documents:
        batch.append((split, document))
        characters += len(str(document))
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
