"""--trace of a real run through the launcher, and what trace_report.py says of it."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from ibp_deepspeed.commands.training.arguments import parse_arguments
from ibp_deepspeed.commands.training.trace import batches
from ibp_deepspeed.errors import TraceError
from ibp_deepspeed.trace import chrome
from tests.commands import script
from tests.docs.test_pages import commands


def test_a_run_leaves_a_trace_of_the_batches_that_were_named(trained: Path) -> None:
    recording = chrome.read(trained / "trace.json")
    assert (recording.stages, recording.micro_batches, recording.first, recording.last) == (2, 2, 5, 6)
    assert {(p.stage, p.replica) for p in recording.processes} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert {span.rank for span in recording.spans} == {0, 1, 2, 3}


def test_the_report_says_where_the_time_went(trained: Path, tmp_path: Path) -> None:
    numbers, picture = tmp_path / "report.json", tmp_path / "trace.png"
    done = script("trace_report.py", trained, "--json", numbers, "--picture", picture, "--replica", "1")
    assert done.returncode == 0, done.stderr
    assert "batches 5 to 6, 2 stages, 2 micro-batches" in done.stdout and "hidden behind computing" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    stages = json.loads(numbers.read_text())["stages"]
    assert [stage["stage"] for stage in stages] == [0, 1]
    for stage in stages:
        waited = sum(wait["seconds"] for wait in stage["waits"])
        parts = sum(stage["computing"].values()) + waited + sum(stage["other"].values()) + stage["between"]
        assert parts == pytest.approx(stage["seconds"], rel=1e-3) and min(stage["computing"].values()) > 0
    assert {"replicas"} <= {wait["cause"] for wait in stages[0]["waits"]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{run}/history.jsonl"], "is not a trace"),
        (["{run}/checkpoint"], "can't read the trace"),
        (["{run}", "--replica", "2"], "the trace has replicas 0 to 1"),
        (["{run}", "--picture", "{run}/trace.words"], "can't write"),
        (["{run}", "--json", "{run}/nowhere/report.json"], "can't write"),
    ],
)
def test_the_report_refuses_in_one_sentence(trained: Path, words: list[str], said: str) -> None:
    done = script("trace_report.py", *(word.format(run=trained) for word in words))
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_the_pages_commands_run(trained: Path, tmp_path: Path) -> None:
    """Those of docs/tracing.md and docs/run-report.md, on this run."""
    training, traced = commands("tracing.md")
    options = training[training.index("scripts/train_lm.py") + 1 :]
    assert batches(parse_arguments(None, options), None) == (91, 93)
    for command in (traced, *commands("run-report.md")):
        words = [word.replace("runs/first", str(trained)) for word in command[2:]]
        done = script(command[1].removeprefix("scripts/"), *words)
        assert done.returncode == 0, done.stderr
    assert (trained / "trace.png").exists() and (trained / "run_report.html").exists()


def _arguments(trace: str | None, steps: int = 20, one_process: bool = False) -> Namespace:
    return Namespace(trace=trace, steps=steps, one_process=one_process)


def test_without_a_value_three_batches_of_a_warm_pipeline_are_traced() -> None:
    assert batches(_arguments(None), None) is None
    assert batches(_arguments(""), None) == (11, 13)
    assert batches(_arguments("", steps=5), None) == (3, 5)
    assert batches(_arguments("", steps=2), None) == (1, 2)
    assert batches(_arguments(""), "global_step16") == (18, 20)
    assert batches(_arguments("17"), "global_step16") == (17, 17)


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        ("3:two", "write it as FIRST:LAST"),
        ("0:3", "this run trains batches 7 to 20"),
        ("6:8", "this run trains batches 7 to 20"),
        ("9:8", "this run trains batches 7 to 20"),
        ("19:21", "this run trains batches 7 to 20"),
    ],
)
def test_batches_that_are_not_trained_are_refused(trace: str, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        batches(_arguments(trace), "global_step6")


def test_one_process_has_no_pipeline() -> None:
    with pytest.raises(TraceError, match="one-process"):
        batches(_arguments("", one_process=True), None)
