"""What the headers keep that are compared at the end of a batch."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from ibp_deepspeed.stage.sample_ledger import SampleLedger
from tests.toys import micro_batches
from tests.workers.parity import make_engine


def run_case(case: dict[str, Any]) -> list[int]:
    """Headers, and those of them that are more than numbers, at the end of each batch."""
    engine = make_engine(case, case["stages"], case["micro_batches"], torch.float32, True, 1)
    kept: list[int] = []
    check = SampleLedger.check

    def measured(ledger: SampleLedger) -> None:
        views = [row for row, _ in ledger._rows if not all(type(number) is int for number in row)]
        kept.extend((len(ledger._rows), len(views)))
        check(ledger)

    with mock.patch.object(SampleLedger, "check", measured):
        engine.train_batch(iter(micro_batches(0, case["micro_batches"])))
    engine.close()
    return kept
