"""The page on faults names tests and files that exist, and a hook that is called."""

from __future__ import annotations

import re

from ibp_deepspeed.engine.moment import Moment
from tests.docs.test_docs import ROOT, blocks

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_each_fault_names_a_test_that_exists() -> None:
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| fault")]
    assert len(rows) >= 40 and all(len(row) == 4 for row in rows)
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[3])
        assert named or "the same" in row[3], row
        for path, name in named:
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), (path, name)


def test_the_files_of_the_page_exist() -> None:
    for path in re.findall(r"`((?:ibp_deepspeed|tests)/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).exists(), path


def test_the_hook_of_the_page_looks_at_what_a_moment_has() -> None:
    (code,) = blocks(PAGE, "python")
    compile(code, "docs/reliability.md", "exec")
    attributes = set(re.findall(r"moment\.(\w+)", code))
    assert len(attributes) == 4 and attributes <= set(Moment._fields)
