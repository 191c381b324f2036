"""A recording as a file that Perfetto and chrome://tracing open, and back.

The Trace Event Format's JSON: a process for each rank, complete events (``X``) for spans, flow events (``s``, ``f``)
for messages, and what the trace is of under ``otherData``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from ibp_deepspeed.atomic_files import replace_text
from ibp_deepspeed.errors import OutputError, TraceError
from ibp_deepspeed.json_text import parsed
from ibp_deepspeed.schedule import instructions
from ibp_deepspeed.schedule.instructions import Instruction, Link
from ibp_deepspeed.trace.spans import CREDIT, LATE, WEIGHTS, Process, Recording, Span

_FORMAT = "interlocking trace 1"
_MICRO = 1e6
_NAMES = {WEIGHTS: "W", CREDIT: "wait for credit", "LoadMicroBatch": "load", "BackwardWeight": "W, the rest"}
_MESSAGES = {
    "RecvActivation": "receive activation",
    "SendActivation": "send activation",
    "RecvGrad": "receive gradient",
    "SendGrad": "send gradient",
}
_WHOLE = {LATE: "late targets and copies", "ReduceGrads": "reduce gradients", "OptimizerStep": "optimizer step"}


def name_of(span: Span) -> str:
    """For a viewer: ``F 3``, ``receive gradient 3 of loss 2``, ``optimizer step``."""
    if span.kind in _WHOLE:
        return _WHOLE[span.kind]
    kind = instruction_of(span.kind)
    name = _NAMES.get(span.kind) or _MESSAGES.get(span.kind) or (kind.letter if kind else "") or span.kind
    loss = "" if span.loss is None else f" of loss {span.loss}"
    return f"{name} {span.micro_batch}{loss}"


def instruction_of(kind: str) -> type[Instruction] | None:
    """The class of a span's instruction, with its facts; None: it is none of a micro-batch's."""
    found = getattr(instructions, kind, None)
    return found if isinstance(found, type) and issubclass(found, Instruction) else None


class _Args(BaseModel, extra="ignore"):
    kind: str
    batch: int = Field(ge=1)
    micro_batch: int = Field(ge=-1)
    loss: int | None = None


class _Span(BaseModel, extra="ignore"):
    pid: int = Field(ge=0)
    ts: float = Field(allow_inf_nan=False)
    dur: float = Field(ge=0, allow_inf_nan=False)
    args: _Args


class _Process(BaseModel, extra="forbid"):
    rank: int = Field(ge=0)
    stage: int = Field(ge=0)
    replica: int = Field(ge=0)
    host: str
    uncertainty: float = Field(ge=0, allow_inf_nan=False)


class _About(BaseModel, extra="forbid"):
    format: Literal["interlocking trace 1"]
    stages: int = Field(ge=1)
    micro_batches: int = Field(ge=1)
    first: int = Field(ge=1)
    last: int = Field(ge=1)
    interlocking: dict[str, Any]
    has_aux_heads: bool
    frozen: list[int] = []
    device: str
    processes: list[_Process] = Field(min_length=1)


def write(recording: Recording, path: Path) -> None:
    """The file, complete or not there.

    Raises:
        OutputError: it can't be written.
    """
    names = [field.name for field in fields(recording) if field.name not in ("spans", "processes")]
    about = {name: getattr(recording, name) for name in names} | {"processes": list(map(asdict, recording.processes))}
    trace = {
        "displayTimeUnit": "ms",
        "otherData": {"format": _FORMAT, **about},
        "traceEvents": [*_processes(recording), *map(_complete, recording.spans), *_flows(recording)],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(trace, separators=(",", ":")) + "\n")
    except OSError as error:
        raise OutputError(f"can't write the trace {path}: {error.strerror}.") from error


def _processes(recording: Recording) -> Iterator[dict[str, Any]]:
    for process in recording.processes:
        name = f"stage {process.stage}, replica {process.replica} (rank {process.rank}, {process.host})"
        order = process.replica * recording.stages + process.stage
        yield {"ph": "M", "pid": process.rank, "tid": 0, "name": "process_name", "args": {"name": name}}
        yield {
            "ph": "M",
            "pid": process.rank,
            "tid": 0,
            "name": "process_sort_index",
            "args": {"sort_index": order},
        }
        yield {"ph": "M", "pid": process.rank, "tid": 0, "name": "thread_name", "args": {"name": "instructions"}}


def _complete(span: Span) -> dict[str, Any]:
    kind = instruction_of(span.kind)
    computes = span.kind == WEIGHTS or (kind is not None and bool(kind.costs))
    args = {"kind": span.kind, "batch": span.batch, "micro_batch": span.micro_batch, "loss": span.loss}
    return {
        "ph": "X",
        "pid": span.rank,
        "tid": 0,
        "name": name_of(span),
        "cat": "computing" if computes else "message" if span.kind in _MESSAGES else "other",
        "ts": round(span.start * _MICRO, 3),
        "dur": round(span.seconds * _MICRO, 3),
        "args": args,
    }


def _flows(recording: Recording) -> Iterator[dict[str, Any]]:
    """An arrow from each sending to its receiving."""
    places = {process.rank: process for process in recording.processes}
    for number, (sent, taken) in enumerate(messages(recording)):
        name = "gradient" if sent.loss is not None else "activation"
        common = {"id": number, "tid": 0, "name": name, "cat": f"messages of replica {places[sent.rank].replica}"}
        yield {**common, "ph": "s", "pid": sent.rank, "ts": round(sent.start * _MICRO, 3)}
        yield {**common, "ph": "f", "bp": "e", "pid": taken.rank, "ts": round(taken.end * _MICRO, 3) - 0.001}


def messages(recording: Recording) -> Iterator[tuple[Span, Span]]:
    """Sendings and the receivings of what they sent, where both are recorded."""
    sent: dict[tuple[Any, ...], Span] = {}
    places = {process.rank: process for process in recording.processes}
    for sends in (True, False):
        for span in recording.spans:
            kind = instruction_of(span.kind)
            link = None if kind is None else kind.sends if sends else kind.receives
            if link is None:
                continue
            place = places[span.rank]
            to = place.stage + link.value * sends
            key = (place.replica, link, to, span.batch, span.micro_batch, span.loss if link is Link.GRADIENTS else None)
            if sends:
                sent[key] = span
            elif key in sent:
                yield sent[key], span


def read(path: Path) -> Recording:
    """A file that :func:`write` wrote.

    Raises:
        TraceError: there is none, or it is none of ours, or broken.
    """
    try:
        trace = parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TraceError(f"can't read the trace {path}: {error.strerror}; train_lm.py --trace writes one.") from None
    except ValueError:
        raise TraceError(f"{path} is not a trace: it is no JSON, or cut off. Record it again with --trace.") from None
    known = isinstance(trace, dict) and isinstance(trace.get("otherData"), dict)
    seen = trace["otherData"].get("format") if known else None
    if seen != _FORMAT or not isinstance(trace.get("traceEvents"), list):
        what = "none of train_lm.py's" if seen is None else f"of format {seen!r}, this version reads {_FORMAT!r}"
        raise TraceError(f"the trace {path} is {what}: record one with train_lm.py --trace.")
    try:
        about = _About.model_validate(trace["otherData"])
        events = (e for e in trace["traceEvents"] if isinstance(e, dict) and e.get("ph") == "X")
        spans = [_span(_Span.model_validate(event)) for event in events]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise TraceError(f"the trace {path} is broken: {place}: {first['msg']}. Record it again.") from None
    return _checked(path, about, spans)


def _checked(path: Path, about: _About, spans: list[Span]) -> Recording:
    ranks = {process.rank for process in about.processes}
    strangers = {span.rank for span in spans} - ranks
    silent = ranks - {span.rank for span in spans}
    if strangers or silent or about.last < about.first or any(p.stage >= about.stages for p in about.processes):
        what = f"rank {min(strangers)} is unknown" if strangers else f"rank {min(silent, default=0)} did nothing"
        raise TraceError(f"the trace {path} is broken: {what} in batches {about.first} to {about.last}.")
    values = {name: getattr(about, name) for name in type(about).model_fields if name not in ("format", "processes")}
    processes = [Process(**process.model_dump()) for process in about.processes]
    return Recording(**values, processes=processes, spans=sorted(spans, key=lambda s: (s.rank, s.start, -s.end)))


def _span(event: _Span) -> Span:
    start = event.ts / _MICRO
    return Span(event.pid, **event.args.model_dump(), start=start, end=start + event.dur / _MICRO)
