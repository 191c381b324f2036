"""Streaming for long, with pauses at random places: the numbers of one process, and nothing piles up."""

from __future__ import annotations

import json
from pathlib import Path

from tests.commands import speed_benchmark


def test_nothing_grows_and_the_parameters_are_those_of_one_process(tmp_path: Path, full: bool) -> None:
    """2,000 batches on four stages with --full, when memory is looked at too; else 60 on two."""
    size = () if full else ("--stages", 2, "--batches", 60, "--micro-batches", 2)
    done = speed_benchmark("soak", *size, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert len(rows) == (4 if full else 2) and (tmp_path / "soak.png").stat().st_size > 0
    for row in rows:
        assert row["difference"] <= 1e-6, row
        assert row["handles"][1] <= row["handles"][0] and row["threads"][1] <= row["threads"][0], row
        assert max(row["under_way"]) <= 8 and row["keys"][1] <= row["keys"][0] + 2 * len(rows), row
        assert not full or row["memory"][1] - row["memory"][0] < 2, row
