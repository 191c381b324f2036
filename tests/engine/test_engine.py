"""What the engine promises beside equal gradients: scale, DeepSpeed's numbers, and no hidden barrier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.launch import launch
from tests.single_process.test_reference import gradients as reference_gradients


def test_equals_deepspeed_at_full_width() -> None:
    """N = K, mode furthest, is PipelineEngine's backpropagation, step by step."""
    cases = [
        {"stages": 3, "micro_batches": m, "steps": 5, "optimizer": optimizer}
        for m in (1, 2, 5)
        for optimizer in ("sgd", "adamw")
    ]
    cases.append({"stages": 3, "micro_batches": 2, "steps": 5, "optimizer": "sgd", "tied": True})
    for rows in launch("against_deepspeed", 3, cases).check().reports:
        for case, row in zip(cases, rows, strict=True):
            assert row["worst"]["parameter"] <= 1e-6 and row["worst"]["loss"] <= 1e-6, (case, row)


def test_the_scale_of_each_loss_in_closed_form() -> None:
    """A linear model whose gradients are known by hand: every loss is divided by M = 3 once."""
    blocks: list[dict[str, Any]] = [
        {"strategy": "local"},
        {"strategy": "pairwise"},
        {"strategy": "pairwise", "mode": "window"},
        {"strategy": "pairwise", "mode": "window", "window_weights": [1.0, 0.5]},
        {"strategy": "nwise", "width": 3, "mode": "window"},
        {"strategy": "global"},
    ]
    reports = launch("closed_form", 3, blocks).check().reports
    for index, block in enumerate(blocks):
        trunks, heads = reference_gradients(block)[:3], reference_gradients(block)[3:]
        assert [reports[k][index]["trunk"] for k in range(3)] == pytest.approx(trunks, rel=1e-12)
        assert [reports[k][index]["head"] for k in range(2)] == pytest.approx(heads, rel=1e-12)


@pytest.fixture(scope="module")
def paused() -> dict[str, list[dict[str, Any]]]:
    """Four runs in which the last of four stages sleeps 2 s in its first batch."""
    base = {"micro_batches": 6, "batches": 6, "seconds": 2.0}
    blocks = {
        "local": {"strategy": "local", "channel_depth": 60},
        "pairwise": {"strategy": "pairwise", "channel_depth": 60},
        "shallow": {"strategy": "local", "channel_depth": 6},
        "blocking": {"strategy": "local", "channel_depth": 60, "streaming": False},
    }
    reports = launch("pause", 4, [{**base, "interlocking": block} for block in blocks.values()]).check().reports
    return {name: [reports[k][i] for k in range(4)] for i, name in enumerate(blocks)}


def progress(stages: list[dict[str, Any]], what: str) -> list[int]:
    """How many forward passes or batches each stage finished before the pause was over."""
    end = stages[3]["pause"][1] - 0.1
    return [sum(stamp < end for stamp in stage[what]) for stage in stages]


def test_local_learning_runs_ahead_of_a_paused_stage(paused: dict[str, list[dict[str, Any]]]) -> None:
    assert progress(paused["local"], "batches") == [5, 5, 5, 0], "three stages finish all batches meanwhile"


def test_pairwise_waits_only_where_the_mathematics_does(paused: dict[str, list[dict[str, Any]]]) -> None:
    forwards = progress(paused["pairwise"], "forwards")
    assert progress(paused["pairwise"], "batches") == [0, 0, 0, 0]
    assert forwards[2] == 2, "the predecessor needs the last loss of its first micro-batch for its second slot"
    assert forwards[0] > forwards[2], f"the first stage gets further, by micro-batches: {forwards}"


def test_backpressure_bounds_the_run_ahead(paused: dict[str, list[dict[str, Any]]]) -> None:
    batches, forwards = progress(paused["shallow"], "batches"), progress(paused["shallow"], "forwards")
    assert batches[2] == 1, "a channel of one batch lets the predecessor run one batch ahead"
    assert 6 <= forwards[2] <= 6 + 3, "…plus what the paused stage took and had posted"


def test_without_streaming_nobody_starts_the_next_batch(paused: dict[str, list[dict[str, Any]]]) -> None:
    assert progress(paused["blocking"], "forwards")[:3] == [6, 6, 6]
    assert progress(paused["blocking"], "batches") == [0, 0, 0, 0]


def test_checkpoint_round_trip_and_learning_rate_schedule(tmp_path: Path) -> None:
    """Trunks, heads, optimizer and scheduler come back from DeepSpeed's layout; rank 0 knows all losses."""
    cases = [{"zero": zero, "folder": str(tmp_path / str(zero))} for zero in (0, 1)]
    reports = launch("checkpoints", 4, cases).check().reports
    for rank, rows in enumerate(reports):
        for row in rows:
            assert row["difference"] == 0.0, "the resumed run equals the uninterrupted one"
            assert row["rates"] == sorted(row["rates"]) and row["rates"][0] < row["rates"][-1], "warm-up"
            assert (row["newest"] is not None) == (rank == 0)
    assert sorted(p.name for p in (tmp_path / "0" / "middle").glob("aux_head_*")) == ["aux_head_02-model_states.pt"]


@pytest.mark.parametrize("worker", ["ledger", "nccl"])
def test_headers_keep_no_message_alive(worker: str) -> None:
    """Six activations of a batch are compared at its end: by numbers, where views would keep the messages."""
    case = {"stages": 2, "micro_batches": 6, "interlocking": {"strategy": "local"}, "worker": "ledger"}
    first, second = (rows[0] for rows in launch(worker, 2, [case]).check().reports)
    assert first == [0, 0] and second == [6, 0]
