"""What rank 0 shows while it trains: a live table of all stages on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ibp_deepspeed import measures

_COLUMNS = {
    "loss": (measures.LOSS, "{:.3f}"),
    "grad norm": (measures.TRUNK_NORM, "{:.3g}"),
    "of head": (measures.HEAD_NORM, "{:.3g}"),
    "waiting": (measures.WAITING, "{:.0%}"),
    "memory, GiB": (measures.PEAK_MEMORY, "{:.2f}"),
    "tokens/s": (measures.TOKENS, "{:,.0f}"),
    "images/s": (measures.IMAGES, "{:,.0f}"),
}
"""Of the table: name → what is shown, and how."""
_MOST_ROWS = 16
_SILENCE = 60.0
"""Seconds after which a batch gets a line, where no report does."""

Stages = Sequence[dict[str, float]]


class Display(ABC):
    """Of one rank."""

    @abstractmethod
    def advance(self, text: str) -> None:
        """One batch more was trained; ``text`` is the newest known of losses and speed."""

    @abstractmethod
    def report(self, step: int, stages: Stages, text: str) -> None:
        """All stages have reported batch ``step``."""

    @abstractmethod
    def say(self, line: str) -> None:
        """A line that stays."""

    @abstractmethod
    def close(self) -> None:
        """Nothing more is shown."""


class Silent(Display):
    """Of the other ranks."""

    def advance(self, text: str) -> None:
        """Nothing."""

    def report(self, step: int, stages: Stages, text: str) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines(Display):
    """Into a file or a pipe: a line for each report, and for the first batch that ends a minute after the line before.

    Args:
        steps, done: of the whole run, and trained before.
    """

    def __init__(self, steps: int, done: int) -> None:
        self._steps, self._done = steps, done
        self._said = time.monotonic()

    def advance(self, text: str) -> None:
        """Nothing, mostly: a line a batch would be too many."""
        self._done += 1
        if time.monotonic() - self._said >= _SILENCE:
            self.say(f"batch {self._done}/{self._steps}{': ' if text else ' is trained'}{text}")

    def report(self, step: int, stages: Stages, text: str) -> None:
        """One line, with what the stages differ in."""
        shown = [text, *(words for name in ("grad norm", "waiting", "memory, GiB") if (words := _row(name, stages)))]
        self.say(f"batch {step}/{self._steps}: {'; '.join(shown)}")

    def say(self, line: str) -> None:
        """A line, at once."""
        print(line, flush=True)
        self._said = time.monotonic()

    def close(self) -> None:
        """Nothing."""


class Terminal(Display):
    """A progress bar with the newest losses, and above it a row for each stage.

    Args:
        steps, done: of the whole run, and trained before.
        console: where.
    """

    def __init__(self, steps: int, done: int, console: Console) -> None:
        columns = (TextColumn("batch"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("", total=steps, completed=done)
        self._text = ""
        self._table: Table | None = None
        self._live = Live(get_renderable=self._shown, console=console, refresh_per_second=4, vertical_overflow="crop")
        self._live.start()

    def advance(self, text: str) -> None:
        """The bar and its text; drawn by a thread, four times a second."""
        self._bar.advance(self._task)
        self._text = text

    def report(self, step: int, stages: Stages, text: str) -> None:
        """Another table."""
        self._table = stage_table(step, stages)

    def say(self, line: str) -> None:
        """Above table and bar."""
        self._live.console.print(line, highlight=False, markup=False)

    def close(self) -> None:
        """Leave the last table on the screen."""
        self._live.stop()

    def _shown(self) -> Group:
        return Group(*(() if self._table is None else (self._table,)), self._bar, Text(self._text))


def stage_table(step: int, stages: Stages) -> Table:
    """A row for each stage; of many stages the first and last ones."""
    names = [name for name, (measure, _) in _COLUMNS.items() if any(measure in stage for stage in stages)]
    table = Table(title=f"stages at batch {step:,}", title_justify="left")
    for name in ("stage", *names):
        table.add_column(name, justify="right")
    half = _MOST_ROWS // 2
    for number, stage in enumerate(stages):
        if len(stages) <= _MOST_ROWS or number < half or number >= len(stages) - half:
            table.add_row(str(number), *(_cell(name, stage) for name in names))
        elif number == half:
            table.add_row(*["…"] * (1 + len(names)))
    return table


def display_for(first: bool, steps: int, done: int) -> Display:
    """Of a rank; the first one's standard output decides."""
    if not first:
        return Silent()
    console = Console()
    is_live = console.is_terminal and not console.is_dumb_terminal
    return Terminal(steps, done, console) if is_live else Lines(steps, done)


def _row(name: str, stages: Stages) -> str:
    """A column of the table as words; nothing if no stage has it."""
    cells = [_cell(name, stage) for stage in stages]
    return f"{name} {' '.join(cells)}" if set(cells) != {"–"} else ""


def _cell(name: str, stage: dict[str, float]) -> str:
    measure, form = _COLUMNS[name]
    return form.format(stage[measure]) if measure in stage else "–"
