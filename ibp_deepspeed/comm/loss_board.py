"""Losses of all stages on rank 0, without a stage ever waiting for another.

Each stage writes its newest losses under a key of the job's key-value store, from a background thread; rank 0 reads
the keys when it wants to print. Nothing is lost if nobody reads, and nothing grows.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = 5.0  # seconds; a store that has ended raises at once
_REST = 0.1  # seconds at most between two writes


class LossBoard:
    """The newest losses of K stages.

    Args:
        store: key-value store of the job; the board uses keys ``<prefix>/<loss>``.
        stages: K.
        window: how many batches of losses a stage keeps visible; more than the first stage can be ahead of the last
            one, and as many again as may be trained between two writes.
    """

    def __init__(self, store: dist.Store, stages: int, window: int) -> None:
        self.store, self.stages, self.window = store, stages, window
        self._given: deque[tuple[int, dict[int, Tensor]] | None] = deque()
        self._is_given = threading.Event()
        self._recent: dict[int, dict[int, float]] = {}  # loss → batch → value
        self._thread: threading.Thread | None = None

    @classmethod
    def of_engine(cls, stages: int, batches_ahead: int) -> LossBoard:
        """A board for the next engine of this job, on all ranks; ``batches_ahead``: of a stage before the next one."""
        store = dist.distributed_c10d._get_default_store()
        engine_number = store.add(f"ibp_engines/{dist.get_rank()}", 1)  # the same on all ranks
        store = dist.PrefixStore(f"ibp_losses/{engine_number}", store.clone())  # type: ignore[attr-defined]
        return cls(store, stages, window=stages * (batches_ahead + 2) + 16)

    def publish(self, batch: int, losses: dict[int, Tensor]) -> None:
        """Make a stage's losses of a batch visible, by their indices; returns at once."""
        self._give((batch, losses))
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="loss board", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the background thread after what is queued; a thread inside the store would abort an ending process."""
        self._give(None)
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    def latest(self) -> tuple[Tensor, int] | None:
        """The newest batch of which all K losses are known: losses [K] (float64) and the batch's number."""
        found = self.after(0)
        return found[-1] if found else None

    def after(self, batch: int) -> list[tuple[Tensor, int]]:
        """Of each batch after that one of which all K losses are known still: losses [K] (float64), the batch's number.

        Nothing is missing to whoever asks within ``window`` batches.
        """
        keys = [str(stage) for stage in range(self.stages)]
        if not self.store.check(keys):
            return []
        rows = [dict(json.loads(value)) for value in self.store.multi_get(keys)]
        common = sorted(number for number in set.intersection(*(set(row) for row in rows)) if number > batch)
        return [(torch.tensor([row[number] for row in rows], dtype=torch.float64), number) for number in common]

    def _give(self, entry: tuple[int, dict[int, Tensor]] | None) -> None:
        self._given.append(entry)
        if not self._is_given.is_set():
            self._is_given.set()

    def _write(self) -> None:
        """Write what is given, then rest ten times as long as that took: the thread takes time from the training."""
        ended = False
        while not ended:
            self._is_given.wait()
            self._is_given.clear()
            while self._given:
                entry = self._given.popleft()
                if entry is None:
                    ended = True
                else:
                    self._remember(*entry)
            began = time.monotonic()
            try:
                for index, recent in self._recent.items():
                    self.store.set(str(index), json.dumps(list(recent.items())))
            except RuntimeError:  # the store ended with the job: nobody is left to read
                return
            if not ended:
                time.sleep(min(_REST, 10 * (time.monotonic() - began)))

    def _remember(self, batch: int, losses: dict[int, Tensor]) -> None:
        for index, loss in losses.items():
            recent = self._recent.setdefault(index, {})
            recent[batch] = float(loss)
            for old in sorted(recent)[: -self.window]:
                del recent[old]
