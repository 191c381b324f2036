"""run_report.html: one file that shows a run, without anything from a network."""

from __future__ import annotations

import json
import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibp_deepspeed import measures
from ibp_deepspeed.atomic_files import replace_text
from ibp_deepspeed.commands.reporting.files import HISTORY, PAGE
from ibp_deepspeed.commands.reporting.history import History, losses_of
from ibp_deepspeed.commands.reporting.plots import plots
from ibp_deepspeed.commands.reporting.prediction import compare
from ibp_deepspeed.commands.reporting.record import RunRecord

_TEMPLATES = Path(__file__).parent
_RECENT = 600.0  # seconds without a line of history after which a run is no longer called running


@dataclass(frozen=True)
class Fact:
    """A number at the top of the page."""

    name: str
    value: str


def write_page(folder: Path) -> Path:
    """Make the page of a run's folder, whatever is there of it so far.

    Returns:
        its path.

    Raises:
        InterlockingError: there is no record of a run, or one of the files is something else.
    """
    path = folder / PAGE
    replace_text(path, render(RunRecord.read(folder), History.read(folder), folder))
    return path


def render(record: RunRecord, history: History, folder: Path) -> str:
    """The page as text; everything that a user wrote is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    entropy, unit = record.unigram_entropy, "GPU" if _has_gpu(history) else "process"
    values: dict[str, Any] = {
        "name": folder.resolve().name,
        "state": _state(record, history, folder),
        "record": record,
        "command": shlex.join(record.command),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.started)),
        "facts": _facts(record, history),
        "plots": plots(history, record.stages, entropy, unit, record.counted),
        "comparison": compare(record, history),
        "one_process": record.processes == 1,
        "rows": _table(record, history),
        "spikes": [(step, found, samples) for step, exits, samples in history.spikes for found in exits],
        "blocks": {
            "DeepSpeed configuration": json.dumps(record.ds_config, indent=2),
            "Model": json.dumps(record.model, indent=2),
            "Options": json.dumps(record.options, indent=2),
        },
    }
    return environment.get_template("template.html").render(values)


def _state(record: RunRecord, history: History, folder: Path) -> str:
    last = max((rows[-1][0] for rows in (history.train, history.held_out, history.stages) if rows), default=0)
    if record.interrupted:
        return f"interrupted after {record.interrupted:,} of {record.last_step:,} batches; --resume goes on"
    if record.ended is not None:
        return f"finished after {record.last_step:,} batches and {_duration(record.ended - record.started)}"
    file = folder / HISTORY
    quiet = time.time() - (file.stat().st_mtime if file.exists() else record.started)
    how = "runs" if quiet < _RECENT else f"has not finished, and has said nothing for {_duration(quiet)}"
    return f"{how}: {last:,} of {record.last_step:,} batches reported"


def _facts(record: RunRecord, history: History) -> list[Fact]:
    last = record.stages - 1
    found = [Fact("stages", str(record.stages)), Fact("micro-batches a batch", str(record.micro_batches))]
    for name, rows in (("training loss", history.train), ("held-out loss", history.held_out)):
        losses = losses_of(rows, record.stages, last)[1]
        if losses:
            found.append(Fact(f"{name} of the model", f"{losses[-1]:.3f}"))
    times = [time for k in range(record.stages) if (time := history.batch_time(k)) is not None]
    if times:
        found.append(Fact(f"{record.counted} a second", f"{record.tokens_per_batch / max(times):,.0f}"))
    drawn = history.drawn_tokens()
    for name, tokens in drawn.items():
        found.append(Fact(f"tokens of {name}", f"{tokens:,} ({tokens / sum(drawn.values()):.1%})"))
    waits = [wait for k in range(record.stages) if (wait := history.mean(k, measures.WAITING)) is not None]
    if waits:
        found.append(Fact("waiting, mean stage", f"{sum(waits) / len(waits):.0%}"))
    return found


def _table(record: RunRecord, history: History) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and for each measure its newest value of each stage."""
    names: list[str] = []
    for _, stages in history.stages[-20:]:
        names += [name for stage in stages for name in stage if name not in names]
    rows = []
    for name in names:
        newest = [(history.of_stage(stage, name)[1] or [math.nan])[-1] for stage in range(record.stages)]
        rows.append([name, *("–" if math.isnan(value) else f"{value:,.4g}" for value in newest)])
    return ["", *(f"stage {stage}" for stage in range(record.stages))], rows


def _has_gpu(history: History) -> bool:
    names = {measures.throughput(counted, "GPU") for counted in ("tokens", "images")}
    return any(not names.isdisjoint(stage) for _, stages in history.stages[-1:] for stage in stages)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
