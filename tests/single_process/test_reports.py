"""What stages in one process report: the values of the reference, and nothing that does not exist there."""

from __future__ import annotations

from typing import Any, cast

import pytest
from torch import nn

from ibp_deepspeed import measures
from ibp_deepspeed.single_process.virtual_pipeline import VirtualPipeline
from tests.toys import loss_fn, make_reference, micro_batches
from tests.workers.reports import by_hand

WINDOW = {"strategy": "pairwise", "mode": "window"}


class Monitor:
    """Remembers what is written to it."""

    enabled = True

    def __init__(self) -> None:
        self.events: list[tuple[str, float, int]] = []

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        self.events += events


def test_losses_and_norms_are_reported_at_the_interval_as_they_were_before_clipping() -> None:
    parts, monitor = make_reference(3, WINDOW), Monitor()
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_print": 2,
        "gradient_clipping": 0.01,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "interlocking": WINDOW,
    }
    stages, heads = cast(list[nn.Sequential], parts.stages), list(parts.aux_heads.values())
    pipeline = VirtualPipeline(stages, heads, loss_fn, settings, monitor=monitor)
    pipeline.train_batch(iter(micro_batches(0, 2)))
    assert pipeline.new_reports() == []
    reference, rows = make_reference(3, WINDOW), micro_batches(1, 2)
    for stage in range(3):
        for one, other in zip(reference.parameters(stage), pipeline.reference.parameters(stage), strict=True):
            one.data.copy_(other.data)
    pipeline.train_batch(iter(rows))
    (report,) = pipeline.new_reports()
    assert report.step == 2 and pipeline.new_reports() == []
    for got, want in zip(report.stages, by_hand(reference, rows), strict=True):
        want.pop(measures.COSINE, None)
        assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-5)
        assert set(got) - set(want) == {measures.LEARNING_RATE, measures.BATCH_TIME}
    assert monitor.events == measures.events(2, report.stages)
    assert ("Train/stage 1/learning rate", 0.1, 2) in monitor.events
