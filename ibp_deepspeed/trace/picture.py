"""A recording as a picture of stages × time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ibp_deepspeed.schedule.instructions import (
    AuxLoss,
    BackwardBorrowed,
    BackwardInput,
    BackwardPass,
    BackwardWeight,
    ForwardPass,
)
from ibp_deepspeed.trace.report import letter_of
from ibp_deepspeed.trace.spans import Recording, Span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"F": "#4c78a8", "L": "#e45756", "B": "#f2b447", "Q": "#b279a2", "W": "#b8d8a8", "BW": "#54a24b"}
"""By the letters of the instructions that compute."""
_KINDS = (ForwardPass, AuxLoss, BackwardInput, BackwardBorrowed, BackwardWeight, BackwardPass)
_READABLE = 1 / 70
"""Share of the width that a box with a number in it needs."""


def draw(recordings: Sequence[tuple[str, Recording]], unit: float = 1e-3, label: str = "ms") -> Figure:
    """One panel a recording, one line a stage of its first replica; the number in a box is the micro-batch, later
    batches are paler.

    Args:
        recordings: with their titles.
        unit: seconds of the time axis.
        label: what the axis counts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lines = sum(recording.stages for _, recording in recordings)
    figure = Figure(figsize=(11, 1.1 + 0.55 * len(recordings) + 0.27 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(recordings), 1, sharex=True, squeeze=False)[:, 0]
    longest = max(_length(recording) for _, recording in recordings) / unit
    seen: set[str] = set()
    for axes, (title, recording) in zip(panels, recordings, strict=True):
        seen |= _panel(axes, recording, unit, longest)
        axes.set_title(title, fontsize=9, loc="left")
    panels[-1].set_xlabel(f"{label}; the number is the micro-batch, paler are later batches")
    handles = [Patch(color=COLOURS[kind.letter], label=kind.meaning) for kind in _KINDS if kind.letter in seen]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def _panel(axes: Any, recording: Recording, unit: float, longest: float) -> set[str]:
    """Fill a panel; returns the letters in it."""
    seen = set()
    spans, stages = _computing(recording), {process.rank: process.stage for process in recording.processes}
    origin = min((span.start for span in spans), default=0.0)
    for span in spans:
        letter, stage = letter_of(span), stages[span.rank]
        seen.add(letter)
        left, width = (span.start - origin) / unit, span.seconds / unit
        pale = 0.5 * (span.batch - recording.first) / max(1, recording.batches - 1)
        style = {"color": COLOURS[letter], "edgecolor": "white", "linewidth": 0.6, "alpha": 1 - pale}
        axes.barh(stage, width, left=left, **style)
        if width > _READABLE * longest:
            axes.text(left + width / 2, stage, str(span.micro_batch), ha="center", va="center", fontsize=7)
    axes.set_yticks(range(recording.stages), [f"stage {k}" for k in range(recording.stages)], fontsize=8)
    axes.set_ylim(recording.stages - 0.5, -0.5)
    axes.set_xlim(0, longest)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return seen


def _computing(recording: Recording) -> list[Span]:
    ranks = {process.rank for process in recording.of_replica(0)}
    return [span for span in recording.spans if span.rank in ranks and letter_of(span)]


def _length(recording: Recording) -> float:
    spans = _computing(recording)
    return max((span.end for span in spans), default=0.0) - min((span.start for span in spans), default=0.0)
