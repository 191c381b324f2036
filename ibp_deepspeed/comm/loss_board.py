"""Losses of all stages on rank 0, without a stage ever waiting for another.

Each stage writes its newest losses under a key of the job's key-value store, from a background thread; rank 0 reads
the keys when it wants to print. Nothing is lost if nobody reads, and nothing grows.
"""

from __future__ import annotations

import json
import queue
import threading

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = 5.0  # seconds; a store that has ended raises at once


class LossBoard:
    """The newest losses of K stages.

    Args:
        store: key-value store of the job; the board uses keys ``<prefix>/<loss>``.
        stages: K.
        window: how many batches of losses a stage keeps visible; at least as many as the first stage can be ahead
            of the last one.
    """

    def __init__(self, store: dist.Store, stages: int, window: int) -> None:
        self.store, self.stages, self.window = store, stages, window
        self._queue: queue.SimpleQueue[tuple[int, dict[int, Tensor]] | None] = queue.SimpleQueue()
        self._recent: dict[int, dict[int, float]] = {}  # loss → batch → value
        self._thread: threading.Thread | None = None

    @classmethod
    def of_engine(cls, stages: int, batches_ahead: int) -> LossBoard:
        """A board for the next engine of this job, on all ranks; ``batches_ahead``: of a stage before the next one."""
        store = dist.distributed_c10d._get_default_store()
        engine_number = store.add(f"ibp_engines/{dist.get_rank()}", 1)  # the same on all ranks
        store = dist.PrefixStore(f"ibp_losses/{engine_number}", store.clone())  # type: ignore[attr-defined]
        return cls(store, stages, window=stages * (batches_ahead + 2) + 4)

    def publish(self, batch: int, losses: dict[int, Tensor]) -> None:
        """Make a stage's losses of a batch visible, by their indices; returns at once."""
        self._queue.put((batch, losses))
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="loss board", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the background thread after what is queued; a thread inside the store would abort an ending process."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    def latest(self) -> tuple[Tensor, int] | None:
        """The newest batch of which all K losses are known: losses [K] (float64) and the batch's number."""
        keys = [str(stage) for stage in range(self.stages)]
        if not self.store.check(keys):
            return None
        rows = [dict(json.loads(value)) for value in self.store.multi_get(keys)]
        common = set.intersection(*(set(row) for row in rows))
        if not common:
            return None
        batch = max(common)
        return torch.tensor([row[batch] for row in rows], dtype=torch.float64), batch

    def _write(self) -> None:
        while (entry := self._queue.get()) is not None:
            batch, losses = entry
            for index, loss in losses.items():
                recent = self._recent.setdefault(index, {})
                recent[batch] = float(loss)
                for old in sorted(recent)[: -self.window]:
                    del recent[old]
            if not self._queue.empty():
                continue
            try:
                for index, recent in self._recent.items():
                    self.store.set(str(index), json.dumps(list(recent.items())))
            except RuntimeError:  # the store ended with the job: nobody is left to read
                return
