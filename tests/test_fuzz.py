"""Files with anything in them end in a sentence of ours: never in another error, in all memory, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from tests import fuzzing
from tests.forks import end, fork


def test_files_with_anything_in_them(full: bool, tmp_path: Path) -> None:
    """A hundred of each kind, always the same ones; with --full a thousand new ones."""
    examples, out = (1000 if full else 100), tmp_path / "out.txt"
    words = (tmp_path, examples, full)
    process = fork(fuzzing.run, *words, environment=os.environ, stdout=out, stderr=out)
    (code,) = end([process], 540 if full else 240)
    assert code == 0, out.read_text()[-5000:]
    assert out.read_text().count(": done\n") == 5
