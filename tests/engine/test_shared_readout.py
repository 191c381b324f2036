"""Heads that follow the last stage's LM head: in real processes as in the reference, whatever the messages do."""

from __future__ import annotations

import re
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch

from ibp_deepspeed.config.interlocking import least_refresh_delay
from ibp_deepspeed.objectives.shared_readout import RefreshRule
from tests.engine.test_parity import interlocking
from tests.launch import launch
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
    """Intervals, delays, averages, widths, modes and numbers of micro-batches, mixed."""
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


def following(interval: int, delay: int | None = None, width: int = 2, **head: Any) -> dict[str, Any]:
    block: dict[str, Any] = case(3, 2, width, interval, delay)["interlocking"]
    block["aux_head"].update(head)
    return block


def run(world_size: int, cases: dict[str, list[dict[str, Any]]]) -> dict[str, list[list[Any]]]:
    """Run cases in one set of processes: by name, what each rank says of each case."""
    flat = [{"task": "parity", **each} for group in cases.values() for each in group]
    reports = launch("readouts", world_size, flat, timeout=500).check().reports
    ends = list(accumulate(map(len, cases.values()), initial=0))
    return {name: [rows[low:high] for rows in reports] for name, (low, high) in zip(cases, pairwise(ends), strict=True)}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Any]]]:
    """Three processes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    resumed = {"average": following(2, 5, average=0.5), "newest": following(1)}
    return run(
        3,
        {
            "parity": matrix(3),
            "late": [{"task": "late", "interlocking": block} for block in (following(2, width=1), following(1, 1))],
            "resume": [{"task": "resume", "interlocking": b, "folder": str(folder / n)} for n, b in resumed.items()],
            "refusals": [{"task": "refusals", "interlocking": following(2)}],
            "average": [{"task": "average", "interlocking": following(1, 0, average=0.9)}],
            "real": [
                {"task": "real", "interlocking": following(2, 1, blocks=1), "tied": False},
                {"task": "real", "interlocking": following(1, 2, width=1, blocks=1), "tied": True},
                *({"task": "real", "interlocking": block, "tied": False} for block in SAMPLED),
            ],
        },
    )


SAMPLED: list[dict[str, Any]] = [
    {"strategy": "pairwise", "mode": "window", "aux_head": options}
    for options in (
        {"rank": 4, "aux_tokens": 0.3, "aux_tokens_seed": 5},
        {"negatives": 20, "aux_tokens": 0.5},
        {"negatives": 30, "negatives_by": "uniform", "readout": "shared", "refresh_interval": 2, "refresh_delay": 3},
    )
]


@pytest.fixture(scope="module")
def four() -> dict[str, list[list[Any]]]:
    """Four processes: four stages, and two stages × two replicas (where the reference's default delay is another one,
    because it sees the micro-batches of both)."""
    return run(
        4,
        {
            "parity": [*matrix(4)[1::2], case(4, 1, 1, interval=2, average=0.5)],
            "replicas": [
                case(2, 1, 1, interval=2, delay=3, zero=0, clip=0.05),
                case(2, 5, 2, mode="window", delay=0, zero=1),
                case(2, 2, 2, interval=2, average=0.5, optimizer="adamw", zero=1, clip=0.05, eval=True),
                frozen(2, 2, 1, zero=1),
            ],
            "bf16": [
                case(2, 5, 2, delay=1, zero=0, dtype="bf16"),
                case(2, 5, 1, delay=1, zero=1, dtype="bf16"),
                frozen(2, 5, 2, zero=1, dtype="bf16"),
            ],
        },
    )


def check(ranks: list[list[dict[str, float]]], tolerance: float) -> None:
    """Gradients, parameters with copies, losses and evaluations: relative errors."""
    for rank, rows in enumerate(ranks):
        for number, row in enumerate(rows):
            errors = {name: row[name] for name in ("gradient", "parameter", "loss", "eval")}
            assert max(errors.values()) <= tolerance, f"rank {rank}, case {number}: {errors}"


def test_equals_the_reference(three: dict[str, Any], four: dict[str, Any]) -> None:
    """Parameters, copies and losses: 1e-5 in fp32."""
    for ranks in (three["parity"], four["parity"], four["replicas"]):
        check(ranks, 1e-5)


def test_bf16(four: dict[str, Any]) -> None:
    """Micro-batches, steps and tolerance are those of test_parity's bf16 test."""
    check(four["bf16"], 3e-2)


def test_numbers_do_not_depend_on_time(three: dict[str, Any]) -> None:
    """A slow last stage and late messages."""
    assert three["late"] == [[{"same": [True, True]}] * 2] * 3


def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(three: dict[str, Any]) -> None:
    """In a new engine, and in one that has trained on; without the pending copies it is refused."""
    for average, newest in three["resume"]:
        assert average["pending"] == [2, 4] and newest["pending"] == [3, 4, 5]
        assert average["same"] == newest["same"] == [True, True]
        assert re.search("batch 6 and later need .* when batch 2 began, but .* does not exist", average["refusal"])


def test_an_average_is_exact_in_bf16(three: dict[str, Any]) -> None:
    """Copies are the rounded average: rounded averages would stand still."""
    assert all(all(same) for [same] in three["average"]), three["average"]


def test_real_models_equal_the_reference(three: dict[str, Any]) -> None:
    """A cut llama with a block in each head, tied or not; low-rank LM heads on a part of the positions; LM heads, also
    copied ones, over a part of the vocabulary: 1e-5."""
    for row in [row for rows in three["real"] for row in rows]:
        assert row["loss"] <= 1e-5 and row["parameter"] <= 1e-5, row


REFUSALS = [
    "needs heads with a method readout_tensors.* a Layer has none",
    "the copied LM head of a Head is trained too: set requires_grad to False",
    r"the head of stage 0 copies an LM head of \[\(\(6, 6\), torch.float32\)\], the last stage's is",
    "needs a last layer with a method readout_tensors",
    '"interlocking.aux_head.borrow" moves the heads, whose parameters were taken from the module before',
    '"interlocking.aux_head.borrow" is 2, but stage 1 has 2 layers: it needs more than are borrowed',
]


def test_what_cannot_follow_is_refused_on_all_ranks(three: dict[str, Any]) -> None:
    for [texts] in three["refusals"]:
        for text, sentence in zip(texts, REFUSALS, strict=True):
            assert re.search(sentence, text), text


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
