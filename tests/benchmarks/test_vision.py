"""The study on images goes on where it was stopped, and its table has what is there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.vision import __main__ as study
from ibp_deepspeed.cli import SameOnAllRanks


def test_the_study_resumes_and_prints_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output", str(tmp_path), "--steps", "1", "--batch-size", "16", "--seeds", "1", "--arms"]
    printed = []
    for arms in (["local"], ["local", "end-to-end"], ["local", "end-to-end"]):
        monkeypatch.setattr(sys, "argv", ["benchmarks.vision", *words, *arms])
        study.main(SameOnAllRanks())
        printed.append(capsys.readouterr().out)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["arm"], len(row["accuracy"])) for row in rows] == [("local", 4), ("end-to-end", 4)]
    assert rows[1]["accuracy"][:3] == [None] * 3 and rows[0]["accuracy"][0] is not None
    assert "local, seed 0" in printed[0] and "local, seed 0" not in printed[1] and "seed 0" not in printed[2]
    table = [line.split("|") for line in printed[2].splitlines() if line.startswith(("| local", "| end"))]
    times = [float(cells[5]) for cells in table]
    assert len(times) == 2 and times[0] < times[1], "with one micro-batch the narrower is faster"
