"""The benchmark suite runs its cases, and its rows say what was measured."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from benchmarks.pages import filled
from benchmarks.speed import report
from benchmarks.speed.cases import links
from benchmarks.speed.contenders import applies
from benchmarks.speed.harness import Spread, table
from benchmarks.speed.namespaces import missing
from tests.commands import Done, real, speed_benchmark


def benchmark(
    case: str, folder: Path, *options: str, start: Callable[..., Done] = speed_benchmark
) -> dict[str, dict[str, object]]:
    """Rows of a record, by contender."""
    done = start(case, *options, "--repeats", "1", "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((folder / f"{case}.json").read_text())
    assert record["command"].endswith(f"--out {folder}") and record["machine"]["torch"]
    assert (folder / f"{case}.png").stat().st_size > 0
    assert all(row["contender"] in done.stdout for row in record["rows"])
    return {row["contender"]: row for row in record["rows"]}


def test_no_contender_is_faster_than_its_work(tmp_path: Path) -> None:
    """Sleeping stages, K = 2, M = 4, all peers: nobody takes less time than a stage's work."""
    rows = benchmark("emulated", tmp_path, "--stages", "2", "--micro-batches", "4", "--unit", "0.01")
    assert list(rows) == ["N=1", "B-W", "sum", "1F1B", "DualPipeV", "ZBV", "ZB1", "2BW"]
    for name, row in rows.items():
        assert row["units"][0] >= (3.1 if name in ("N=1", "sum") else 3.0), row  # type: ignore[index]
        assert all(0 <= share < 1 for share in row["idle"]), row  # type: ignore[attr-defined]
    assert rows["1F1B"]["speedup"] == 1 and rows["N=1"]["limit"] == pytest.approx(3.1)


def test_a_latency_is_waited_for(tmp_path: Path) -> None:
    """Two units a message: 1F1B at K = 2, M = 1 waits for both directions, N = 1 for none in the steady state."""
    options = ("--stages", "2", "--micro-batches", "1", "--latencies", "2", "--unit", "0.02", "--measured", "6")
    rows = benchmark("latency", tmp_path, *options, "--contenders", "N=1", "1F1B")
    assert rows["1F1B"]["units"][0] >= 6 + 2 * 2  # type: ignore[index]
    assert rows["N=1"]["predicted"] == pytest.approx(3.1) and rows["1F1B"]["predicted"] == pytest.approx(10)


def test_recording_is_compared_with_not_recording(tmp_path: Path) -> None:
    row = benchmark("trace", tmp_path, "--work", "nothing", "--measured", "2")["nothing"]
    assert row["off"][0] > 0 and row["on"][0] > 0  # type: ignore[index]


def test_overhead_has_a_row_for_each_engine_and_bare_loop(tmp_path: Path) -> None:
    command = partial(real, sys.executable, "-m", "benchmarks.speed")  # its own way of starting processes
    rows = benchmark("overhead", tmp_path, "--stages", "2", "--micro-batches", "2", "--batches", "4", start=command)
    assert list(rows) == ["bare N=1", "N=1", "bare N=2", "N=2", "bare 1F1B", "1F1B"]
    assert rows["bare 1F1B"]["beyond_bare_ms"] == 0
    assert {"ForwardPass", "RecvActivation", "BackwardPass"} <= set(rows["N=1"]["instruction_ms"])  # type: ignore[call-overload]


def test_what_an_engine_holds_is_what_is_planned(tmp_path: Path) -> None:
    """A real Llama, K = 3, M = 4: weights, gradients and the optimizer's state to the byte, activations within 10%."""
    small = ("--layers", "6", "--stages", "3", "--micro-batches", "4", "--contenders", "N=1", "N=2", "B-W", "B-W fused")
    done = speed_benchmark("footprint", *small, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "footprint.json").read_text())["rows"]
    assert len(rows) == 12 and "Largest deviation of what is held from what is planned: weights +0.0%" in done.stdout
    for row in rows:
        for part in ("weights", "gradients", "optimizer"):
            assert row["held"][part] == row["planned"][part] > 0, (part, row)
        assert row["held"]["activations"] == pytest.approx(row["planned"]["activations"], rel=0.1), row


def test_saved_activations_reach_their_bound_and_no_more(tmp_path: Path) -> None:
    """A real Llama, K = 3, M = 4: live micro-batches of every stage, over batches that follow each other at once."""
    small = ("--width", "32", "--tokens", "16", "--vocabulary", "64", "--contenders", "N=1", "N=2 fused", "B-W", "1F1B")
    done = speed_benchmark("memory", "--stages", "3", "--micro-batches", "4", *small, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [row["bound"] for row in rows] == [1, 1, 1, 2, 2, 1, 3, 3, 3, 3, 2, 1]
    for row in rows:  # a stage that waits works off what is due, so that it may stay below
        reached = row["live"] == row["bound"] or row["contender"] == "B-W" and row["stage"] > 0
        assert reached and row["live"] <= row["bound"], row
    first = {row["contender"]: row["against_1f1b"] for row in rows if row["stage"] == 0}
    assert first["N=1"] < 0.4 and first["N=2 fused"] < 0.7 and first["B-W"] == pytest.approx(1, abs=0.01)


def test_the_split_backward_pass_of_real_layers_is_measured(tmp_path: Path) -> None:
    sizes = ("--width", "64", "--tokens", "16", "--repeats", "2", "--kinds", "llama", "--dtypes", "fp32")
    rows = benchmark("split", tmp_path, *sizes)
    assert list(rows) == ["fused", "split", "graph", "twice"] and rows["fused"]["both"] == 1
    assert rows["split"]["held"] < 1 < rows["graph"]["held"]  # type: ignore[operator]


def test_cheaper_heads_compute_the_same_loss(tmp_path: Path) -> None:
    sizes = ("--vocabularies", "600", "--tokens", "64", "--width", "16")
    rows = benchmark("heads", tmp_path, *sizes)
    same = ["naive", "chunks of 128", "chunks of 512", "chunks of 64 MiB", "shared readout"]
    assert [rows[name]["loss"] for name in same] == pytest.approx([rows["naive"]["loss"]] * len(same))
    few = "negatives 64"
    assert rows[few]["loss"] == rows[f"shared readout, {few}"]["loss"]
    assert {*rows} == {*same, "aux_tokens 0.25", "rank 64", few, f"shared readout, {few}"}
    assert rows["naive"]["time_ratio"] == 1


@pytest.mark.skipif(missing() is not None, reason=f"slow links: {missing()}")
def test_a_slow_link_is_waited_for(tmp_path: Path) -> None:
    """0.25 MiB at 20 Mb/s take 0.1 s: 1F1B with one micro-batch waits for it twice a batch."""
    layout = ("--stages", "2", "--stages-a-host", "1", "--micro-batches", "1")
    sizes = (*layout, "--kib", "256", "--unit", "0.01", "--measured", "3")
    rows = benchmark("links", tmp_path, *sizes, "--contenders", "N=1", "B-W", "1F1B", "--megabits", "20")
    assert rows["1F1B"]["megabits"] == 20 and rows["1F1B"]["units"][0] >= 6 + 2 * 10  # type: ignore[index]


def test_no_links_without_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert links.run(argparse.Namespace()) == []
    assert "slow links are not measured: it needs root" in capsys.readouterr().err


def test_real_compute_counts_tokens(tmp_path: Path) -> None:
    sizes = ("--micro-batches", "2", "--layers", "4", "--width", "32", "--vocabulary", "64", "--measured", "2")
    rows = benchmark("compute", tmp_path, *sizes)
    assert list(rows) == ["N=1", "B-W", "B-W fused", "1F1B"] and rows["1F1B"]["speedup"] == 1
    assert all(row["tokens_per_second"][0] > 0 for row in rows.values())  # type: ignore[index]


def test_contenders_apply_where_they_can() -> None:
    assert [applies(name, 4, 4) for name in ("N=1", "N=4", "1F1B", "DualPipeV", "ZBV")] == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert applies("ZBV", 4, 8)


def test_spread_and_table() -> None:
    assert Spread.of([3.0, 1.0, 2.0]).scaled(10) == [20, 10, 30]
    assert table([{"a": 1}], {"x": lambda row: str(row["a"])}).splitlines() == ["| x |", "|---|", "| 1 |"]


def test_tables_of_the_pages_are_those_of_the_records() -> None:
    made = list(report.tables(report.load(report.RESULTS)))
    for page in report.PAGES:
        text = page.read_text(encoding="utf-8")
        titles = re.findall("<!-- table: (.*) -->", text)
        assert titles and set(titles) <= {title for title, _ in made}
        assert filled(text, made) == text
