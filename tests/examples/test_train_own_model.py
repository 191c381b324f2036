"""The example of a training of one's own, with the launcher that the README starts it with."""

from __future__ import annotations

import re
from pathlib import Path

from tests.commands import deepspeed, ranks
from tests.docs.test_docs import README, ROOT, blocks

EXAMPLE = ROOT / "examples" / "train_own_model.py"


def reports(printed: str) -> dict[int, list[float]]:
    """Batch → the held-out losses that were printed after it."""
    found = re.findall(r"^batch (\d+): held-out losses of the exits ([\d. ]+),", printed, flags=re.MULTILINE)
    return {int(batch): [float(loss) for loss in losses.split()] for batch, losses in found}


def test_a_training_of_ones_own_learns_and_resumes_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = deepspeed(2, EXAMPLE, "--until", 50, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    said = reports(whole.stdout)
    assert list(said) == [20, 40, 50] and all(len(losses) == 2 for losses in said.values()), whole.stdout
    assert all(after < before for before, after in zip(said[20], said[50], strict=True)), said
    for until in (30, 50):
        part = ranks(2, f"../examples/{EXAMPLE.name}", "--until", until, "--output", tmp_path / "parts")
        assert part.returncode == 0, part.stdout + part.stderr
    assert reports(part.stdout) == {40: said[40], 50: said[50]}


def test_the_readme_shows_lines_of_the_example() -> None:
    """In their order; what is left out is an ellipsis."""
    (shown,) = blocks(README, "python")
    left = iter([line.strip() for line in EXAMPLE.read_text(encoding="utf-8").splitlines()])
    lines = [line.strip() for line in shown.splitlines() if line.strip() not in ("", "...")]
    assert len(lines) > 10
    for line in lines:
        assert line in left, f"not in {EXAMPLE.name}, or not in this order: {line}"
