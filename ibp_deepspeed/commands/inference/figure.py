"""The picture of early exit by confidence: what is saved against agreement and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ibp_deepspeed.models.exits.early_exit import EarlyExit


def draw(points: Sequence[EarlyExit], fixed: Sequence[EarlyExit], exits: Sequence[int], path: Path) -> None:
    """Two panels over the share of layers saved.

    Args:
        points: of the rule, one a threshold: a line.
        fixed: all positions leaving at one exit, in the order of ``exits``: dots with names.
        exits: their numbers, the last one the model's.
        path: PNG, or what the name's ending says.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(9, 3.8), constrained_layout=True)
    labels = ("positions that agree with the model (%)", "perplexity")
    for axes, attribute, factor, label in zip(both, ("agreement", "perplexity"), (100, 1), labels, strict=True):
        ordered = sorted([*points, fixed[-1]], key=lambda point: point.saved)
        saved = [100 * point.saved for point in ordered]
        axes.plot(saved, [factor * getattr(p, attribute) for p in ordered], label="by confidence", color="C0")
        for number, point in zip(exits, fixed, strict=True):
            at = (100 * point.saved, factor * getattr(point, attribute))
            axes.plot(*at, "o", color="C1", label="all at one exit" if point is fixed[0] else None)
            name = "model" if number == exits[-1] else f"exit {number}"
            axes.annotate(name, at, textcoords="offset points", xytext=(5, 5), fontsize=8)
        axes.set(xlabel="decoder layers saved (%)", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("Early exit by confidence, held-out text")
    figure.savefig(path, dpi=130)
    plt.close(figure)
