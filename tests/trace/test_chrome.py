"""The file: read back equal, opened by another reader, refused in one sentence when it is broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hta.common.trace_parser import parse_trace_dataframe
from hta.configs.parser_config import ParserConfig

from ibp_deepspeed.errors import OutputError, TraceError
from ibp_deepspeed.schedule.simulator import Costs
from ibp_deepspeed.trace import chrome
from ibp_deepspeed.trace.picture import draw
from ibp_deepspeed.trace.spans import Recording
from tests.trace.simulated import recording


@pytest.fixture(scope="module")
def pairwise() -> Recording:
    """Three stages, in units of a millisecond."""
    return recording({"strategy": "pairwise"}, [Costs(1e-3, 1e-3, 1e-3, 1e-4)] * 3, micro_batches=2)


@pytest.fixture
def path(pairwise: Recording, tmp_path: Path) -> Path:
    chrome.write(pairwise, tmp_path / "trace.json")
    return tmp_path / "trace.json"


def test_what_is_written_is_read_again(pairwise: Recording, path: Path) -> None:
    again = chrome.read(path)
    assert (again.processes, again.interlocking) == (pairwise.processes, pairwise.interlocking)
    for rank, spans in pairwise.by_rank.items():
        found = again.by_rank[rank]
        assert sorted(map(chrome.name_of, spans)) == sorted(map(chrome.name_of, found))
        assert sum(s.seconds for s in found) == pytest.approx(sum(s.seconds for s in spans), abs=1e-6)


def test_the_readers_of_profiler_traces_open_it(pairwise: Recording, path: Path) -> None:
    """Holistic Trace Analysis, Meta's reader of the same format."""
    _, frame, symbols = parse_trace_dataframe(str(path), ParserConfig.get_default_cfg())
    names = symbols.get_sym_table()
    assert len(frame) == len(pairwise.spans) and set(frame["pid"]) == {0, 1, 2}
    shown = {names[number] for number in frame["name"]}
    assert {"F 0", "BW 1", "B 0 of loss 1", "receive gradient 1 of loss 1", "optimizer step"} <= shown
    forward = frame[frame["name"] == names.index("F 0")]
    assert len(forward) == 3 * pairwise.batches and forward["dur"].sum() == pytest.approx(6e3, rel=0.01)


def test_an_arrow_leads_from_each_sending_to_its_receiving(path: Path) -> None:
    """Flow events pair up, and lie within spans of the same process, or viewers drop them."""
    events = json.loads(path.read_text())["traceEvents"]
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys() and len(starts) > 8
    spans = [e for e in events if e["ph"] == "X"]
    for flow, kind in [*((e, "Send") for e in starts.values()), *((e, "Recv") for e in ends.values())]:
        around = [e for e in spans if e["pid"] == flow["pid"] and e["ts"] - 0.002 <= flow["ts"] <= e["ts"] + e["dur"]]
        assert any(e["args"]["kind"].startswith(kind) for e in around), flow
    assert all(starts[n]["ts"] <= ends[n]["ts"] + 0.002 for n in starts)


def _changed(change: Callable[[Any], None]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        trace = json.loads(text)
        change(trace)
        return json.dumps(trace)

    return apply


def _spans(trace: Any) -> list[Any]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "cut off": (lambda text: text[:2000], "no JSON, or cut off"),
    "another program's": (lambda text: '{"traceEvents": []}', "none of train_lm.py's"),
    "another format": (lambda text: text.replace("trace 1", "trace 7"), "'interlocking trace 7'"),
    "a list": (lambda text: "[]", "none of train_lm.py's"),
    "negative": (_changed(lambda t: _spans(t)[3].update(dur=-1)), "dur: Input should be greater"),
    "not a number": (_changed(lambda t: _spans(t)[3].update(ts=float("nan"))), "ts: Input should be a finite"),
    "a stranger": (_changed(lambda t: _spans(t)[3].update(pid=9)), "rank 9 is unknown"),
    "nothing": (_changed(lambda t: t.update(traceEvents=[])), "rank 0 did nothing"),
    "no stages": (_changed(lambda t: t["otherData"].pop("stages")), "stages: Field required"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_sentence(path: Path, name: str) -> None:
    change, words = BROKEN[name]
    path.write_text(change(path.read_text()))
    with pytest.raises(TraceError) as caught:
        chrome.read(path)
    assert words in str(caught.value) and "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_file_that_cannot_be_written_says_where(pairwise: Recording, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="trace.json"):
        chrome.write(pairwise, tmp_path / "file" / "trace.json")


def test_a_picture_has_a_box_for_each_piece_of_work(pairwise: Recording) -> None:
    """Three panels would have three lines a stage."""
    figure = draw([("once", pairwise), ("twice", pairwise)])
    computing = sum(s.seconds > 0 and chrome.name_of(s)[:2] in ("F ", "B ", "BW", "L ", "W ") for s in pairwise.spans)
    assert [len(axes.patches) for axes in figure.axes] == [computing, computing] and computing > 30
