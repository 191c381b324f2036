"""Losses and accuracies of all exits of an image classifier: of a pipeline in training, or of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from ibp_deepspeed.data.image_loader import HeldOutImages
from ibp_deepspeed.measures import in_words, or_null
from ibp_deepspeed.objectives.classification import LossAndAccuracy


class Measurable(Protocol):
    """A pipeline, or the exits of a checkpoint."""

    def eval_batch(
        self, data_iter: Iterator[Any], num_micro_batches: int, measure: Callable[[Any, Any], Tensor]
    ) -> Tensor:
        """What a measure gives for the K exits. Shape [K, m], float64."""


@dataclass(frozen=True)
class ImageEvaluation:
    """What an evaluation found; NaN where there is no exit.

    Attributes:
        losses: of each exit, in nats an image.
        accuracies: shares of images whose likeliest class is theirs.
        images: how many were read.
        sample: how much of the split that is, in words.
    """

    losses: list[float]
    accuracies: list[float]
    images: int
    sample: str

    def row(self) -> dict[str, Any]:
        """For a run's history."""
        return {"held_out": or_null(self.losses), "accuracy": or_null(self.accuracies), "images": self.images}

    def in_words(self) -> str:
        """In a line."""
        right = " ".join(f"{share:.1%}" for share in self.accuracies if not math.isnan(share))
        return f"held-out losses of the exits {in_words(self.losses)}, accuracies {right} ({self.images:,} images)"

    def events(self, step: int) -> list[tuple[str, float, int]]:
        """For DeepSpeed's monitors: (name, value, step)."""
        return [
            (f"Eval/stage {row['exit'] - 1}/{name}", row[key], step)
            for key, name in (("loss", "held-out loss (nats per image)"), ("accuracy", "held-out accuracy (share)"))
            for row in self.rows()
        ]

    def rows(self) -> list[dict[str, Any]]:
        """One for each exit (from 1) that has a loss: exit, loss, accuracy, images."""
        found = [(k, *pair) for k, pair in enumerate(zip(self.losses, self.accuracies, strict=True), 1)]
        return [
            {"exit": k, "loss": loss, "accuracy": accuracy, "images": self.images}
            for k, loss, accuracy in found
            if not math.isnan(loss)
        ]

    def table(self) -> str:
        """A row an exit."""
        lines = [f"{'exit':>12} {'loss':>8} {'accuracy':>9}   on {self.sample}"]
        for row in self.rows():
            name = "model" if row["exit"] == len(self.losses) else f"exit {row['exit']}"
            lines.append(f"{name:>12} {row['loss']:>8.4f} {row['accuracy']:>9.2%}")
        return "\n".join(lines)


def evaluate_images(exits: Measurable, held_out: HeldOutImages, *, show: bool = False) -> ImageEvaluation:
    """All exits on a sample of a split.

    Args:
        exits: a pipeline (on all its ranks together) or a checkpoint's exits.
        held_out: this rank's micro-batches.
        show: a progress bar, if there is a terminal.
    """
    bar = tqdm(held_out, desc="evaluating", leave=False, disable=None if show else True, dynamic_ncols=True)
    losses, accuracies = exits.eval_batch(iter(bar), len(held_out), LossAndAccuracy()).T.tolist()
    bar.close()
    return ImageEvaluation(losses, accuracies, held_out.samples, held_out.describe())
