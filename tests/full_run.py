"""When the whole matrices have to run again: when a file that they depend on is not as in their last green run.

That run left a digest of these files in ``full_run.json``, which is committed with them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.forks import ROOT

# What the thinned tests run: the library, their own cases, and the versions that are installed.
_PATTERNS = (
    "ibp_deepspeed/**/*.py",
    "tests/engine/*.py",
    "tests/workers/*.py",
    "tests/covering.py",
    "tests/toys.py",
    "requirements.txt",
)
_OTHERS = {("ibp_deepspeed", "models"), ("ibp_deepspeed", "commands")}
"""Of the library, and not in the thinned tests."""
_STAMP = ROOT / "tests" / "full_run.json"


def digest(root: Path = ROOT) -> str:
    """Of the names and contents of all files that matter."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in _PATTERNS for path in root.glob(pattern)}):
        if path.relative_to(root).parts[:2] in _OTHERS:
            continue
        content = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()


def is_due() -> bool:
    """Whether the files have changed since the last green run."""
    return not _STAMP.exists() or json.loads(_STAMP.read_text())["digest"] != digest()


def was_green() -> None:
    """Remember the files of a run that has just ended without a failure."""
    _STAMP.write_text(json.dumps({"digest": digest()}) + "\n")
