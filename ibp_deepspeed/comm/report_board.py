"""Reports of all stages on rank 0, without a stage ever waiting for another.

As losses do (loss_board.py), a report travels through the job's key-value store, written by a background thread. Each
has a key of its own, which rank 0 removes when it has read all of a batch: none is lost, and nothing grows.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist
from torch import Tensor

from ibp_deepspeed.measures import LOSS, Report, without_nan

_PAUSE = 0.01  # seconds between two looks while they are waited for


class ReportBoard:
    """Reports of K stages.

    Args:
        store: key-value store of the job; the board uses keys ``<batch>/<stage>``.
        stages: K.
    """

    def __init__(self, store: dist.Store, stages: int) -> None:
        self.store, self.stages = store, stages
        self._expected: deque[int] = deque()
        self._writer = ThreadPoolExecutor(1, "report board")

    @classmethod
    def of_engine(cls, stages: int) -> ReportBoard:
        """A board for the next engine of this job, on all ranks."""
        store = dist.distributed_c10d._get_default_store()
        engine_number = store.add(f"ibp_reporting/{dist.get_rank()}", 1)  # the same on all ranks
        return cls(dist.PrefixStore(f"ibp_reports/{engine_number}", store.clone()), stages)  # type: ignore[attr-defined]

    def publish(
        self, batch: int, stage: int, measures: Mapping[str, Tensor | float], losses: Mapping[int, Tensor]
    ) -> None:
        """Make what a stage measured, and the losses that it computed, visible; returns at once."""
        self._writer.submit(self._write, f"{batch}/{stage}", measures, losses)

    def expect(self, batch: int) -> None:
        """On rank 0: all stages have written, or are going to write, a report of this batch."""
        self._expected.append(batch)

    def take(self, patience: float = 0.0) -> list[Report]:
        """On rank 0: the reports that are complete and were not taken yet, in their order.

        Args:
            patience: seconds to wait for those that are not.
        """
        reports, end = [], time.monotonic() + patience
        while self._expected:
            keys = [f"{self._expected[0]}/{stage}" for stage in range(self.stages)]
            if self.store.check(keys):
                rows = [json.loads(value) for value in self.store.multi_get(keys)]
                for key in keys:
                    self.store.delete_key(key)
                reports.append(self._report(self._expected.popleft(), rows))
            elif time.monotonic() < end:
                time.sleep(_PAUSE)
            else:
                break
        return reports

    def close(self) -> None:
        """End the background thread after what is queued."""
        self._writer.shutdown()

    def _write(self, key: str, measures: Mapping[str, Tensor | float], losses: Mapping[int, Tensor]) -> None:
        row = {"measures": {name: float(value) for name, value in measures.items()}}
        text = json.dumps({**row, "losses": {index: float(loss) for index, loss in losses.items()}})
        try:
            self.store.set(key, text)
        except RuntimeError:  # the store ended with the job: nobody is left to read
            return

    def _report(self, batch: int, rows: list[dict[str, dict[str, float]]]) -> Report:
        """A loss belongs to its exit, also where the next stage computes it."""
        losses = {int(index): loss for row in rows for index, loss in row["losses"].items()}
        of_exits = [{LOSS: losses[k]} if k in losses else {} for k in range(self.stages)]
        return Report(batch, [without_nan({**of_exits[k], **row["measures"]}) for k, row in enumerate(rows)])
