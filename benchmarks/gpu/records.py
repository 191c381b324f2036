"""The record of a part: a JSON file that is there when the part has ended, well or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.speed.harness import Row
from ibp_deepspeed.atomic_files import replace_text

Record = dict[str, Any]
"""``part``, ``status`` (done, not run, failed), ``reason``, ``seconds``, ``small``, ``machine``, ``rows``; ``log`` of a
failure, and ``rerun``, the record of a later run that has not measured."""
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


def after(earlier: Record | None, record: Record) -> Record:
    """What is kept of both: what was measured at the same shapes is not given up for a run that has not measured."""
    if earlier is None or earlier["status"] != DONE or earlier["small"] != record["small"] or record["status"] == DONE:
        return record
    return {**earlier, "rerun": record}


def latest(record: Record) -> Record:
    """Of the part's last run."""
    rerun: Record = record.get("rerun", record)
    return rerun


def has_failed(record: Record) -> bool:
    """The part, when it ran last."""
    return bool(latest(record)["status"] == FAILED)


def in_words(record: Record) -> str:
    """How the part ended, and if it was run again without a result, how that did."""
    reason = f": {record['reason']}" if record["reason"] else ""
    rerun = f"; run again: {in_words(record['rerun'])}" if "rerun" in record else ""
    return f"{record['status']}{reason}{rerun}"


def outcome(rows: list[Row]) -> tuple[str, str | None]:
    """Status and reason of a part that has measured: one wrong row fails it."""
    wrong = [row["failed"] for row in rows if "failed" in row]
    return (FAILED, "; ".join(wrong)) if wrong else (DONE, None)
