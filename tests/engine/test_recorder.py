"""What the engine records: every instruction of the schedule in its order, on one clock, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ibp_deepspeed.engine.recorder import DeviceClock
from ibp_deepspeed.trace import chrome
from ibp_deepspeed.trace.report import analyse
from ibp_deepspeed.trace.spans import CREDIT, LATE, WEIGHTS, Recording
from tests.launch import launch
from tests.workers.tracing import APART, ASLEEP, BATCHES, COUNT, FIRST, LAST, STAGES

BLOCKS: dict[str, dict[str, Any]] = {
    "pairwise": {"strategy": "pairwise"},
    "backpropagation": {"strategy": "global", "exits": STAGES},
    "copies": {"strategy": "local", "aux_head": {"readout": "shared", "refresh_interval": 2, "refresh_delay": 4}},
}
CASES = [
    {"interlocking": block, "slow": name == "backpropagation", "follow": name == "copies"}
    for name, block in BLOCKS.items()
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[str, Path]]:
    """Both strategies without a trace and with one, and clocks that are apart: the reports by rank, and the traces."""
    folder = tmp_path_factory.mktemp("traces")
    paths = {name: folder / f"{name}.json" for name in BLOCKS}
    plain = [{**case, "path": ""} for case in CASES]
    traced = [{**case, "path": str(path)} for case, path in zip(CASES, paths.values(), strict=True)]
    reports = launch("tracing", STAGES, [*plain, *traced, {"clocks": True}]).check().reports
    return reports, paths


@pytest.fixture(params=BLOCKS)
def recording(request: pytest.FixtureRequest, run: tuple[list[Any], dict[str, Path]]) -> Recording:
    return chrome.read(run[1][request.param])


def test_tracing_changes_no_number(run: tuple[list[Any], dict[str, Path]]) -> None:
    for report in run[0]:
        plain, traced = report[: len(CASES)], report[len(CASES) : 2 * len(CASES)]
        assert [case["losses"] for case in plain] == [case["losses"] for case in traced]


def test_every_instruction_is_recorded_in_its_order(
    run: tuple[list[Any], dict[str, Path]], recording: Recording
) -> None:
    number = list(BLOCKS.values()).index(recording.interlocking)
    for rank, report in enumerate(run[0]):
        program = [tuple(each) for each in report[len(CASES) + number]["program"]]
        late = [(LATE, -1, None)] if "aux_head" in recording.interlocking else []
        for batch in range(FIRST, LAST + 1):
            spans = [s for s in recording.by_rank[rank] if s.batch == batch and s.kind not in (WEIGHTS, CREDIT)]
            assert [(s.kind, s.micro_batch, s.loss) for s in spans] == late + program
    assert {span.batch for span in recording.spans} == {FIRST, LAST}
    assert {(p.rank, p.stage, p.replica) for p in recording.processes} == {(k, k, 0) for k in range(STAGES)}


def test_a_stage_does_one_thing_at_a_time(recording: Recording) -> None:
    """But for the parts of an instruction, which lie within it."""
    for spans in recording.by_rank.values():
        open_until: list[float] = []
        for span in spans:
            while open_until and open_until[-1] <= span.start:
                open_until.pop()
            assert not open_until or span.end <= open_until[-1]
            open_until.append(span.end)


def test_a_message_arrives_after_it_was_sent(recording: Recording) -> None:
    pairs = list(chrome.messages(recording))
    assert len(pairs) >= 2 * (STAGES - 1) * COUNT
    slack = 2 * max(process.uncertainty for process in recording.processes)
    assert all(taken.end > sent.start - slack for sent, taken in pairs)


def test_the_slow_stage_is_what_the_others_wait_for(run: tuple[list[Any], dict[str, Path]]) -> None:
    """Its layer sleeps, which its cost shows."""
    report = analyse(chrome.read(run[1]["backpropagation"]))
    assert report.costs[STAGES - 1].forward > ASLEEP
    for k in range(STAGES - 1):
        assert ("gradients", k + 1) in {(wait.cause, wait.peer) for wait in report.stages[k].waits}


def test_put_off_weight_gradients_have_spans_of_their_own(run: tuple[list[Any], dict[str, Path]]) -> None:
    recording = chrome.read(run[1]["backpropagation"])
    found = {(s.rank, s.batch, s.micro_batch) for s in recording.spans if s.kind == WEIGHTS}
    batches = range(FIRST, LAST + 1)
    assert found == {(rank, b, m) for rank in range(1, STAGES) for b in batches for m in range(COUNT)}


def test_trained_batches_cannot_be_traced(run: tuple[list[Any], dict[str, Path]]) -> None:
    assert all(f"batch {BATCHES + 1} is the next one" in report[0]["said"] for report in run[0])


def test_clocks_are_aligned(run: tuple[list[Any], dict[str, Path]]) -> None:
    """On one machine, with clocks set apart by known seconds."""
    for rank, report in enumerate(run[0]):
        offset, uncertainty = report[-1]["offset"]
        assert abs(offset + APART * rank) <= uncertainty + 1e-6 and uncertainty < 0.5
        assert (uncertainty > 0) == (rank > 0)


class _Event:
    """torch.cuda.Event's interface, on a device that is 100 ms behind its host."""

    now = 0.0

    def record(self) -> None:
        self.at, _Event.now = _Event.now, _Event.now + 0.25

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, other: _Event) -> float:
        return 1e3 * (other.at - self.at)


def test_a_devices_clock_tells_when_the_device_came_so_far() -> None:
    clock = DeviceClock(_Event)
    stamps = [clock.stamp() for _ in range(4)]
    seconds = clock.seconds(stamps)
    assert stamps[-1].waited
    assert [b - a for a, b in zip(seconds, seconds[1:], strict=False)] == pytest.approx([0.25] * 3)
