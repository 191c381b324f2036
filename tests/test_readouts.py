"""Heads that follow the last stage's readout: in real processes as in the reference, whatever the messages do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ibp_deepspeed.config import least_refresh_delay
from ibp_deepspeed.readout import RefreshRule
from tests.launch import launch
from tests.test_parity import interlocking, run
from tests.toys import make_reference, micro_batches


def case(
    stages: int,
    micro_batches: int,
    width: int,
    interval: int = 1,
    delay: int | None = None,
    average: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A shared readout, trained until two copies are in use at least."""
    mode, others = options.pop("mode", "furthest"), {"refresh_delay": delay, "average": average}
    head = {"readout": "shared", "refresh_interval": interval, **{k: v for k, v in others.items() if v is not None}}
    waits = max(interval, least_refresh_delay(stages, micro_batches)) if delay is None else delay
    return {
        "stages": stages,
        "micro_batches": micro_batches,
        "steps": 2 * (interval + waits) + 1,
        "interlocking": interlocking(width, mode=mode, aux_head=head),
        **options,
    }


def frozen(stages: int, micro_batches: int, width: int, **options: Any) -> dict[str, Any]:
    block = interlocking(width, mode="window", aux_head={"readout": "frozen"})
    return {"stages": stages, "micro_batches": micro_batches, "interlocking": block, **options}


def matrix(stages: int) -> list[dict[str, Any]]:
    """Intervals, delays, averages, widths, modes and micro-batches, each with each of its neighbours."""
    return [
        case(stages, 1, 1),
        case(stages, 2, 2, mode="window", eval=True),
        case(stages, 5, stages),
        case(stages, 1, 2, interval=2),
        case(stages, 5, 1, interval=2, average=0.5),
        case(stages, 2, stages, interval=3, mode="window"),
        case(stages, 2, 1, delay=0),
        case(stages, 5, 2, interval=2, delay=0, average=0.5),
        case(stages, 1, stages, interval=3, delay=0, mode="window"),
        case(stages, 1, 2, delay=1, mode="window"),
        case(stages, 2, 1, interval=3, delay=1),
        case(stages, 2, 2, interval=2, delay=5),
        case(stages, 1, 1, delay=7, average=0.5),
        case(stages, 2, 2, mode="window", optimizer="adamw", clip=0.05),
        frozen(stages, 2, 1),
        frozen(stages, 1, stages, clip=0.05, eval=True),
    ]


def test_three_stages_equal_the_reference() -> None:
    """Parameters, copies and losses: 1e-5 relative in fp32."""
    run(3, matrix(3), 1e-5)


def test_four_processes_equal_the_reference() -> None:
    """Four stages, and two stages × two replicas with ZeRO 0 and 1 (where the reference's default delay is another one,
    because it sees the micro-batches of both)."""
    replicas = [
        case(2, 1, 1, interval=2, delay=3, zero=0, clip=0.05),
        case(2, 5, 2, mode="window", delay=0, zero=1),
        case(2, 2, 2, interval=2, average=0.5, optimizer="adamw", zero=1, clip=0.05, eval=True),
        frozen(2, 2, 1, zero=1),
    ]
    run(4, [*matrix(4)[1::2], case(4, 1, 1, interval=2, average=0.5), *replicas], 1e-5)


def test_bf16() -> None:
    """Two replicas; micro-batches, steps and tolerance are those of test_parity's bf16 test."""
    cases = [case(2, 5, 2 - zero, delay=1, zero=zero, dtype="bf16") for zero in (0, 1)]
    run(4, [*cases, frozen(2, 5, 2, zero=1, dtype="bf16")], 3e-2)


REFUSALS = [
    "needs heads with a method readout_tensors.* a Layer has none",
    "the copied readout of a Head is trained too: set requires_grad to False",
    r"the head of stage 0 copies a readout of \[\(\(6, 6\), 'torch.float32'\)\], the last stage's is",
    "needs a last layer with a method readout_tensors",
    '"interlocking.aux_head.borrow" is 1, which InterlockedReference alone',
]


def following(interval: int, delay: int | None = None, width: int = 2, **head: Any) -> dict[str, Any]:
    block: dict[str, Any] = case(3, 2, width, interval, delay)["interlocking"]
    block["aux_head"].update(head)
    return block


def test_late_messages_resumed_runs_and_real_models(tmp_path: Path) -> None:
    """Three stages each; all in one set of processes."""
    cases: list[dict[str, Any]] = [
        {"task": "late", "interlocking": following(2, width=1)},
        {"task": "late", "interlocking": following(1, 1)},
        {"task": "resume", "interlocking": following(2, 5, average=0.5), "folder": str(tmp_path / "average")},
        {"task": "resume", "interlocking": following(1), "folder": str(tmp_path / "newest")},
        {"task": "refusals", "interlocking": following(2)},
        {"task": "average", "interlocking": following(1, 0, average=0.9)},
        {"task": "real", "interlocking": following(2, 1, blocks=1), "tied": False},
        {"task": "real", "interlocking": following(1, 2, width=1, blocks=1), "tied": True},
    ]
    for rows in launch("readouts", 3, cases).check().reports:
        late, (average, newest, refusals, rounded), real = rows[:2], rows[2:6], rows[6:]
        assert [row["same"] for row in late] == [[True, True]] * 2, "numbers don't depend on time"
        assert average["pending"] == [2, 4] and newest["pending"] == [3, 4, 5]
        assert average["same"] == newest["same"] == [True, True], "resumed runs equal the uninterrupted one bitwise"
        assert re.search(
            "batch 6 and later need the readout .* batch 2 began, but .* does not exist", average["refusal"]
        )
        for text, sentence in zip(refusals, REFUSALS, strict=True):
            assert re.search(sentence, text), text
        assert all(rounded), f"bf16 does not round an average's small steps away: {rounded}"
        assert all(row["loss"] <= 1e-5 and row["parameter"] <= 1e-5 for row in real), real


def test_the_rule() -> None:
    """A head's copy in each batch, from the last readout's history alone."""
    block = case(3, 2, 1, interval=3, delay=4, average=0.25)["interlocking"]
    reference = make_reference(3, block, follow=True)
    optimizer = torch.optim.SGD([p for k in range(3) for p in reference.parameters(k)], lr=0.1)
    source, copy = reference.stages[-1][1].weight, reference.aux_heads[0].readout.weight  # type: ignore[index,union-attr]
    history: list[torch.Tensor] = []
    for batch in range(14):
        history.append(source.detach().clone())  # type: ignore[operator]
        reference.accumulate(micro_batches(batch, 2))
        want = history[0]
        for taken in range(3, batch - 4 + 1, 3):
            want = 0.25 * want + 0.75 * history[taken]
        torch.testing.assert_close(copy, want)
        optimizer.step()
        optimizer.zero_grad()


def test_pending_copies() -> None:
    """Every copy is pending from the batch after it is taken up to the one that uses it."""
    for interval in (1, 2, 5):
        for delay in (0, 1, 2, 7):
            rule = RefreshRule(interval, delay)
            pending: list[int] = []
            for batch in range(30):
                assert rule.pending(batch) == pending
                pending += [batch] if rule.takes(batch) else []
                used = rule.used_from(batch)
                assert used is None or pending.pop(0) == used
