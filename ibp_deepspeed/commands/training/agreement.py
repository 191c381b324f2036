"""What all ranks do after the same batch, though none of them waits for another: rank 0 decides a batch ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

SAVE, STOP, END, EVALUATE = "save", "stop", "end", "evaluate"
"""STOP is an interruption, END the end of a training that needs no more batches."""


class Agreement:
    """Of the ranks of a job, through its key-value store.

    Rank 0 is the first stage of the first replica. No rank ends batch n + 1 before rank 0 has begun it: the other
    stages of its pipeline need its activations, and the other replicas its gradients. So what rank 0 writes before
    batch n + 1 is there when another rank has trained it, and looks.

    Args:
        store: of the job; None: this is the only process.
        rank: of this process.
    """

    def __init__(self, store: dist.Store | None, rank: int) -> None:
        self._store, self._rank = store, rank
        self._decided: dict[int, set[str]] = {}
        self._written = ""

    def before(self, step: int, wanted: Callable[[], set[str]]) -> None:
        """On all ranks, before a batch: rank 0 decides what is done after it.

        Args:
            step: the batch, from 1.
            wanted: what this rank wants now; on rank 0 that is done, another one can only ask to STOP.
        """
        words = wanted()
        if self._rank == 0:
            if self._store is not None and self._store.check(["asked"]):
                words |= {STOP}
            if words:
                self._decided = {step: words}
                if self._store is not None:
                    self._write(f"after {step}", words)
        elif STOP in words and self._store is not None:
            self._store.set("asked", "")

    def after(self, step: int) -> set[str]:
        """What is done after a batch, the same on all ranks."""
        if self._rank == 0 or self._store is None:
            return self._decided.pop(step, set())
        key = f"after {step}"
        return set(self._store.get(key).decode().split()) if self._store.check([key]) else set()

    def leave(self) -> None:
        """On all ranks, after an interruption: end with rank 0, which still writes what it has to say.

        A launcher ends the other processes of its host as soon as one has ended with another code than 0.
        """
        if self._store is None:
            return
        if self._rank == 0:
            self._store.set("leaves", "")
        else:
            self._store.wait(["leaves"])

    def _write(self, key: str, words: set[str]) -> None:
        """In the place of the decision before: all ranks have met since, in the checkpoint that it was about."""
        assert self._store is not None
        if self._written:
            self._store.delete_key(self._written)
        self._written = key
        self._store.set(key, " ".join(sorted(words)))
