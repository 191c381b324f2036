"""The record of a part: a JSON file that is there as soon as the part has ended, well or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.speed.harness import Row
from ibp_deepspeed.atomic_files import replace_text

Record = dict[str, Any]
"""``part``, ``status`` (done, not run, failed), ``reason``, ``seconds``, ``small``, ``machine``, ``rows``."""
DONE, NOT_RUN, FAILED = "done", "not run", "failed"


def path_of(folder: Path, part: str) -> Path:
    """Where the record of a part is."""
    return folder / f"{part}.json"


def write(path: Path, record: Record) -> None:
    """Complete or not at all: a part may be ended at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(record, indent=1) + "\n")


def read(folder: Path, part: str) -> Record | None:
    """The record of a part, None if there is none."""
    path = path_of(folder, part)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def outcome(rows: list[Row]) -> tuple[str, str | None]:
    """Status and reason of a part that has measured: one wrong row fails it."""
    wrong = [row["failed"] for row in rows if "failed" in row]
    return (FAILED, "; ".join(wrong)) if wrong else (DONE, None)
