"""The proof that all stages look at the same micro-batches: every message says which it belongs to."""

from __future__ import annotations

from typing import NoReturn

from ibp_deepspeed.comm.message import Header
from ibp_deepspeed.errors import BatchError


class SampleLedger:
    """Headers that came with messages, beside what this stage expected them to say: compared before each step."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self._rows: list[tuple[Header, Header]] = []

    def add(self, header: Header, batch: int, micro_batch: int, key: int) -> None:
        """Remember a message's header and what it should hold; ``key``: sample checksum, or a gradient's loss."""
        self._rows.append((header, (batch, micro_batch, key)))

    def check(self) -> None:
        """Compare and forget all headers.

        Raises:
            BatchError: a neighbour is at another micro-batch or looks at other samples.
        """
        rows, self._rows = self._rows, []
        for got, want in rows:
            if got != want:
                self._fail(got, want)

    def _fail(self, got: Header, want: Header) -> NoReturn:
        if got[:2] != want[:2]:
            raise BatchError(
                f"stage {self.stage} is at batch {want[0] + 1}, micro-batch {want[1]}, its neighbour sent batch "
                f"{got[0] + 1}, micro-batch {got[1]}: call train_batch and eval_batch in the same order on every rank."
            )
        raise BatchError(
            f"stages {self.stage - 1} and {self.stage} look at different samples in batch {want[0] + 1}, "
            f"micro-batch {want[1]}: give every stage the same data in the same order."
        )
