"""The pictures of a run's page: SVG that takes the page's colours for text and lines, readable on dark too."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ibp_deepspeed import measures
from ibp_deepspeed.commands.reporting.history import History, Series, losses_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TEXT, _GRID = "#010203", "#010204"
"""Stand for the page's colours until the SVG is written."""
_COLOURS = (
    "#3b82c4",
    "#e07b39",
    "#2e9e6b",
    "#c2569b",
    "#8a7fd1",
    "#b08d1e",
    "#d1495b",
    "#4aa3a2",
    "#7c8794",
    "#9c6644",
)
"""With 3:1 and more against white and against the page's dark ground."""
_MOST_LINES = len(_COLOURS)


@dataclass(frozen=True)
class Plot:
    """A picture with what a reader who can't see it is told.

    Attributes:
        title: above it.
        alt: what it shows, with its last values.
        svg: an ``<svg>`` element.
    """

    title: str
    alt: str
    svg: str


def plots(history: History, stages: int, unigram_entropy: float, unit: str, counted: str = "tokens") -> list[Plot]:
    """Those that a run's values allow.

    Args:
        history: of the run.
        stages: K.
        unigram_entropy: of the data, drawn as a line beside the losses.
        unit: GPU or process, what throughput is divided by.
        counted: tokens, or images.
    """
    nats, of_labels = ("nats per token", "unigrams") if counted == "tokens" else ("nats", "class frequencies")
    names = [f"stage {k}" for k in range(stages)]
    train = [losses_of(history.train, stages, k) for k in range(stages)]
    held_out = [losses_of(history.held_out, stages, k) for k in range(stages)]
    accuracy = [losses_of(history.accuracy, stages, k) for k in range(stages)]
    line = (of_labels, unigram_entropy)
    found = [
        _lines("Training losses of the exits", nats, names, train, line=line),
        _lines("Held-out losses of the exits", nats, names, held_out, line=line, marker="o"),
        _lines("Held-out accuracy of the exits", "share", names, accuracy, marker="o"),
        _lines("Throughput", f"{counted}/s", names, _series(history, stages, measures.throughput(counted)), zero=True),
        _time_of_stages(history, stages),
        _lines("Peak memory", "GiB", names, _series(history, stages, measures.PEAK_MEMORY), zero=True),
        _lines("Gradient norm of trunks", "norm", names, _series(history, stages, measures.TRUNK_NORM), log=True),
        _lines("Gradient norm of heads", "norm", names, _series(history, stages, measures.HEAD_NORM), log=True),
        _lines("Own against received gradient", "cosine", names, _series(history, stages, measures.COSINE), marker="o"),
        _lines(
            f"Model FLOPs utilisation of a {unit}", "share", names, _series(history, stages, measures.MFU), zero=True
        ),
    ]
    return [plot for plot in found if plot is not None]


def _series(history: History, stages: int, name: str) -> list[Series]:
    return [history.of_stage(k, name) for k in range(stages)]


def _lines(
    title: str,
    unit: str,
    names: Sequence[str],
    series: Sequence[Series],
    *,
    line: tuple[str, float] | None = None,
    marker: str = "",
    zero: bool = False,
    log: bool = False,
) -> Plot | None:
    """A line for each stage that has values; of many stages some, evenly spread and the last one among them."""
    there = [(name, steps, values) for name, (steps, values) in zip(names, series, strict=True) if values]
    if not there:
        return None
    from matplotlib.ticker import MaxNLocator

    shown = there
    if len(there) > _MOST_LINES:
        shown = [there[round(i * (len(there) - 1) / (_MOST_LINES - 1))] for i in range(_MOST_LINES)]

    def draw(axes: Axes) -> None:
        for colour, (name, steps, values) in zip(_COLOURS, shown, strict=False):
            dot = marker or ("o" if len(values) == 1 else "")
            axes.plot(steps, values, label=name, color=colour, linewidth=1.4, marker=dot, markersize=3.5)
        if line is not None:
            axes.axhline(line[1], color=_TEXT, linewidth=0.8, linestyle=":", label=line[0])
        if log and all(value > 0 for _, _, values in shown for value in values):
            axes.set_yscale("log")
        if zero:
            axes.set_ylim(0, 1.1 * max(max(values) for _, _, values in shown) or 1)
        axes.set_xlabel("batch")
        axes.set_ylabel(unit, labelpad=8)  # the reader's font may be wider than the one measured here
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    last = ", ".join(f"{name} {values[-1]:.4g}" for name, _, values in there)
    alt = f"{title} ({unit}) over {there[0][1][-1]:,} batches. Last values: {last}."
    return Plot(title, alt, _svg(title, draw))


def _time_of_stages(history: History, stages: int) -> Plot | None:
    """Bars of each stage's batch: computing, and waiting by cause; means over the later half of the reports."""
    title = "Where each stage's time went"
    parts = {cause: [history.mean(k, name) for k in range(stages)] for cause, name in measures.WAITING_FOR.items()}
    if any(value is None for values in parts.values() for value in values):
        return None
    waits = {f"waits for {cause}": [100 * (value or 0.0) for value in values] for cause, values in parts.items()}
    computing = [100 - sum(column) for column in zip(*waits.values(), strict=True)]

    from matplotlib.ticker import MaxNLocator

    def draw(axes: Axes) -> None:
        left = [0.0] * stages
        for colour, (name, shares) in zip(_COLOURS[2:3] + _COLOURS[:2] + _COLOURS[8:], rows.items(), strict=False):
            axes.barh(range(stages), shares, left=left, label=name, color=colour, height=0.7)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        axes.set(xlabel="% of its time", ylabel="stage", xlim=(0, 100))
        axes.invert_yaxis()
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))

    rows = {"computes": computing, **waits}
    words = (f"stage {k} computes {computing[k]:.0f}% and waits {100 - computing[k]:.0f}%" for k in range(stages))
    return Plot(title, f"{title}: {', '.join(words)}.", _svg(title, draw))


def _svg(title: str, draw: Callable[[Axes], None]) -> str:
    """A figure as an element that can stand in a page beside others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # text stays text: it can be searched, and takes the reader's font
        "svg.hashsalt": title,  # names of clip paths are the page's
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _TEXT),
        "grid.color": _GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(True, linewidth=0.6)
        axes.set_axisbelow(True)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for size in ("width", "height"):  # the page decides; the proportions are in viewBox
        text = re.sub(rf'(<svg [^>]*?){size}="[^"]*"', r"\1", text, count=1)
    text = text.replace(_TEXT, "currentColor").replace(_GRID, "var(--line)")
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
