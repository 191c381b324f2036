"""A job that stands still ends on all ranks, and one of them says who was waited for."""

from __future__ import annotations

import re

import pytest

from ibp_deepspeed.engine.watchdog import Position, Status, explain, in_words
from ibp_deepspeed.schedule.instructions import ForwardPass, RecvActivation, RecvGrad
from tests.launch import launch


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "layer hangs",
            r"stage 1 \(rank 1 .*\) has been in ForwardPass of micro-batch 1, batch 2 for \d+ s; the limit",
        ),
        ("loader hangs", r"stage 2 \(rank 2 .*\) has been in LoadMicroBatch of micro-batch 0, batch 2 for \d+ s; the"),
        ("process stops", r"stage 1 \(rank 1 .*\) is stopped or gone, last seen in ForwardPass of micro-batch 1, "),
    ],
)
def test_who_hangs_is_named_once(case: str, words: str) -> None:
    run = launch("failures", 4, case, timeout=90, end_with_first_failure=True)
    said = [line for output in run.output for line in output.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and re.search(words, said[0]), run.output
    assert 'the limit is "interlocking.watchdog_seconds": 3' in said[0]
    assert 1 in run.codes and 0 not in run.codes
    assert "stands still: stage 0 (rank 0 on" in run.output[0], "rank 0 tells before the end"


def test_without_a_launcher_all_ranks_end() -> None:
    """Nobody kills them: each leaves by itself."""
    run = launch("failures", 4, "layer hangs", timeout=90)
    assert all(code not in (0, None) for code in run.codes), (run.codes, run.output)


def test_without_a_limit_rank_0_tells_and_the_job_goes_on() -> None:
    run = launch("failures", 4, "layer is slow", timeout=90)
    assert run.codes == [0] * 4, run.output
    told = [line for line in run.output[0].splitlines() if line.startswith("stands still:")]
    assert len(told) == 1 and "stage 0 (rank 0 on" in told[0] and ", waiting for a message: stage 1 (rank" in told[0]
    assert told[0].endswith(" s") and "has been in ForwardPass of micro-batch 1, batch 2 for" in told[0], told


def status(rank: int, doing: str, awaits: int | None = None) -> Status:
    return Status(rank, rank % 3, rank // 3, "here", 5, doing, awaits, 7.0)


def test_waits_are_followed_to_their_end() -> None:
    """Within a replica; ranks 3 to 5 are another one's."""
    stuck = {
        0: status(0, "RecvGrad of micro-batch 1 (loss 1), batch 4", 1),
        1: status(1, "RecvGrad of micro-batch 1 (loss 2), batch 4", 2),
        2: status(2, "ForwardPass of micro-batch 1, batch 4"),
        3: status(3, "RecvGrad of micro-batch 0 (loss 1), batch 4", 1),
        4: status(4, ""),
        5: status(5, "OptimizerStep, batch 3"),
    }
    said = explain(stuck, set(), 0)
    assert said.startswith("stage 0 (rank 0 on here) has been in RecvGrad of micro-batch 1 (loss 1), batch 4 for 7 s, ")
    assert said.endswith("stage 2 (rank 2 on here) has been in ForwardPass of micro-batch 1, batch 4 for 7 s")
    assert explain(stuck, {1}, 0).endswith(
        "stage 1 (rank 1 on here) is stopped or gone, last seen in RecvGrad of micro-batch 1 (loss 2), batch 4"
    )
    assert explain(stuck, set(), 3).endswith("stage 1 (rank 4 on here) is between batches")
    circle = {0: status(0, "a", 1), 1: status(1, "b", 0)}
    assert explain(circle, set(), 0).count("has been in") == 2


def test_a_position_says_what_it_waits_for() -> None:
    position = Position()
    assert in_words(position, 1) == ("", None)
    position.batch = 3
    position.at(RecvActivation(0, micro_batch=2))
    assert in_words(position, 1) == ("RecvActivation of micro-batch 2, batch 3", 0)
    position.at(RecvGrad(0, micro_batch=2, loss=3))
    assert in_words(position, 1) == ("RecvGrad of micro-batch 2 (loss 3), batch 3", 2)
    position.at(ForwardPass(0, micro_batch=2))
    assert in_words(position, 1) == ("ForwardPass of micro-batch 2, batch 3", None)
    position.awaits_credit = True
    assert in_words(position, 1)[1] == 2
