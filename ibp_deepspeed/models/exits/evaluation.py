"""The one evaluation of exits: of a pipeline in training, of a checkpoint, for the table of an export."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from ibp_deepspeed.data import HeldOut
from ibp_deepspeed.measures import in_words, or_null


class HasExits(Protocol):
    """A pipeline, or the exits of a checkpoint."""

    def eval_batch(self, data_iter: Iterator[Any], num_micro_batches: int) -> Tensor:
        """Held-out losses of the K exits. Shape [K], float64."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        losses: of each exit, the mean over all labels that count, in nats; NaN where there is no head.
        tokens: labels that count.
        sample: how much of the split that is, in words.
    """

    losses: list[float]
    tokens: int
    sample: str

    def row(self) -> dict[str, Any]:
        """For a run's history."""
        return {"held_out": or_null(self.losses), "tokens": self.tokens}

    def in_words(self) -> str:
        """In a line."""
        return f"held-out losses of the exits {in_words(self.losses)} ({self.tokens:,} tokens)"

    def events(self, step: int) -> list[tuple[str, float, int]]:
        """For DeepSpeed's monitors: (name, value, step)."""
        name = "held-out loss (nats per token)"
        return [(f"Eval/stage {row['exit'] - 1}/{name}", row["loss"], step) for row in self.rows()]

    def rows(self) -> list[dict[str, Any]]:
        """One for each exit (from 1) that has a loss: exit, loss, perplexity, tokens."""
        found = [(k, loss) for k, loss in enumerate(self.losses, 1) if not math.isnan(loss)]
        return [{"exit": k, "loss": loss, "perplexity": math.exp(loss), "tokens": self.tokens} for k, loss in found]


def evaluate(exits: HasExits, held_out: HeldOut, *, show: bool = False) -> Evaluation:
    """Held-out losses of all exits on a sample of a split; the same for a pipeline and for its checkpoint.

    Args:
        exits: a pipeline (on all its ranks together) or a checkpoint's exits.
        held_out: this rank's micro-batches.
        show: a progress bar, if there is a terminal.
    """
    bar = tqdm(held_out, desc="evaluating", leave=False, disable=None if show else True, dynamic_ncols=True)
    losses = exits.eval_batch(iter(bar), len(held_out))
    bar.close()
    return Evaluation(losses.tolist(), held_out.tokens, held_out.describe())
