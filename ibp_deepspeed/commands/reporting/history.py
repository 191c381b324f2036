"""history.jsonl: what a run reported, by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ibp_deepspeed.commands.reporting.files import HISTORY
from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.json_text import parsed
from ibp_deepspeed.measures import BATCH_TIME

Series = tuple[list[int], list[float]]


@dataclass
class History:
    """A run's values.

    Attributes:
        train: (batch, losses of the stages), NaN where a stage has none.
        held_out: the same of evaluations.
        accuracy: the same of how often classes were right, where there are some.
        stages: (batch, what each stage reported).
        spikes: (batch, exits whose loss jumped, ids of the batch's samples); an exit has "exit" (from 1), "loss" and
            "median", of the batches before.
        drawn: of a mixture: (batch, tokens of each source).
    """

    train: list[tuple[int, list[float]]] = field(default_factory=list)
    held_out: list[tuple[int, list[float]]] = field(default_factory=list)
    accuracy: list[tuple[int, list[float]]] = field(default_factory=list)
    stages: list[tuple[int, list[dict[str, float]]]] = field(default_factory=list)

    spikes: list[tuple[int, list[dict[str, float]], list[int]]] = field(default_factory=list)
    drawn: list[tuple[int, dict[str, int]]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> History:
        """Of a run's folder; a run that has reported nothing yet has empty ones. The line being written is left out.

        Raises:
            InterlockingError: a file that is something else.
        """
        path, history = folder / HISTORY, cls()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return history
        except OSError as error:
            raise InterlockingError(f"can't read {path}: {error.strerror}.") from None
        for number, line in enumerate(lines, 1):
            try:
                row = parsed(line)
                for kind in ("train", "held_out", "accuracy"):
                    if kind in row:
                        losses = [math.nan if loss is None else float(loss) for loss in row[kind]]
                        getattr(history, kind).append((int(row["step"]), losses))
                if "spikes" in row:
                    exits = [dict(found) for found in row["spikes"]]
                    history.spikes.append((int(row["step"]), exits, list(row["samples"])))
                if "drawn" in row:
                    history.drawn.append((int(row["step"]), {str(k): int(n) for k, n in row["drawn"].items()}))
                if "stages" in row:
                    history.stages.append((int(row["step"]), [dict(stage) for stage in row["stages"]]))
            except (ValueError, TypeError, KeyError, AttributeError):
                if number == len(lines):
                    break
                raise InterlockingError(f"{path}, line {number} is not a row of a run's history.") from None
        return history

    def drawn_tokens(self) -> dict[str, int]:
        """Of a mixture: tokens of each source in all batches."""
        names = dict.fromkeys(name for _, tokens in self.drawn for name in tokens)
        return {name: sum(tokens.get(name, 0) for _, tokens in self.drawn) for name in names}

    def of_stage(self, stage: int, name: str) -> Series:
        """Batches and values of what a stage reported under a name."""
        rows = [(step, stages[stage][name]) for step, stages in self.stages if _has(stages, stage, name)]
        return [step for step, _ in rows], [value for _, value in rows]

    def mean(self, stage: int, name: str, last: float = 0.5) -> float | None:
        """Over the time of the later part of the reports; None if there is no value. The first ones warm up."""
        rows = [row[stage] for _, row in self.stages if _has(row, stage, name) and _has(row, stage, BATCH_TIME)]
        kept = rows[int(len(rows) * (1 - last)) :]
        time = sum(row[BATCH_TIME] for row in kept)
        return sum(row[name] * row[BATCH_TIME] for row in kept) / time if kept else None

    def batch_time(self, stage: int, last: float = 0.5) -> float | None:
        """Seconds of a batch in the same reports."""
        values = self.of_stage(stage, BATCH_TIME)[1]
        kept = values[int(len(values) * (1 - last)) :]
        return sum(kept) / len(kept) if kept else None


def losses_of(rows: Sequence[tuple[int, list[float]]], stages: int, stage: int) -> Series:
    """Batches and losses of a stage, of the rows that have so many stages (a resumed run may have had others)."""
    found = [(step, losses[stage]) for step, losses in rows if len(losses) == stages]
    found = [(step, loss) for step, loss in found if not math.isnan(loss)]
    return [step for step, _ in found], [loss for _, loss in found]


def _has(stages: Sequence[dict[str, float]], stage: int, name: str) -> bool:
    return stage < len(stages) and name in stages[stage]
