"""The table of an acceptance, from its records: what was measured, and of what was not, why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import records
from benchmarks.gpu.parts import Part
from benchmarks.gpu.records import Record
from benchmarks.speed.harness import table


def page(folder: Path, parts: dict[str, Part]) -> str:
    """Markdown: how each part ended, then a table for each kind of part."""
    found = {name: records.read(folder, name) for name in parts}
    machine: dict[str, Any] = next(
        (record["machine"] for record in found.values() if record and record.get("machine")), {}
    )
    lines = [f"# Acceptance on {machine.get('device', folder.name)}", "", *_endings(found)]
    for family in dict.fromkeys(part.family for part in parts.values()):
        its = [record for name, record in found.items() if record and parts[name].family == family]
        rows = [row for record in its for row in record["rows"]]
        measured = [row for row in rows if "not_run" not in row]
        if measured:
            module = next(part.module for part in parts.values() if part.family == family)
            title = (module.__doc__ or family).strip().splitlines()[0].rstrip(".")
            lines += ["", f"## {title}", "", table(measured, module.COLUMNS)]
        lines += [f"\n{row['contender']}: not run: {row['not_run']}" for row in rows if "not_run" in row]
    return "\n".join(lines) + "\n"


def _endings(found: dict[str, Record | None]) -> Iterator[str]:
    yield from ("| part | | seconds |", "|---|---|---|")
    for name, record in found.items():
        if record is None:
            yield f"| {name} | not run yet | |"
        else:
            yield f"| {name} | {records.in_words(record)} | {record['seconds']:.0f} |"
