"""What makes the whole matrices run again."""

from __future__ import annotations

from pathlib import Path

from tests.full_run import digest


def test_code_counts_and_pages_do_not(tmp_path: Path) -> None:
    (tmp_path / "ibp_deepspeed" / "engine").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    code, page = tmp_path / "ibp_deepspeed" / "engine" / "one.py", tmp_path / "docs" / "page.md"
    code.write_text("1")
    first = digest(tmp_path)
    page.write_text("more")
    assert digest(tmp_path) == first
    code.write_text("2")
    second = digest(tmp_path)
    code.rename(code.with_name("two.py"))
    assert len({first, second, digest(tmp_path)}) == 3
