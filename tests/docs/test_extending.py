"""The page on extending is one program, and the files that it names exist."""

from __future__ import annotations

import re

import pytest

from tests.docs.test_docs import ROOT, blocks

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def test_the_program_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Two objectives and a head train in one process; a new schedule is valid and slower; all as the page says."""
    exec(compile("\n".join(blocks(PAGE, "python")), "docs/extending.md", "exec"), {"__name__": "page"})
    said = capsys.readouterr().out
    assert "held-out losses:" in said and "units of a first batch:" in said


def test_the_files_of_the_page_exist() -> None:
    named = re.findall(r"`((?:ibp_deepspeed|tests)/[\w/.]+)`", PAGE)
    assert len(named) >= 6
    for path in named:
        assert (ROOT / path).exists(), path
