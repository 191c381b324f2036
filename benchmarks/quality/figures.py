"""Figures of the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.quality.records import Record

_NAMES = {
    "local, shared": "N = 1 (local)",
    "modules of 2, shared": "modules of two stages",
    "2-wise window, shared": "N = 2 (pairwise)",
    "3-wise window, shared": "N = 3",
    "global": "backpropagation",
}


def draw_check(records: Sequence[Record], path: Path) -> None:
    """Accuracy of the last exit over batches, a panel for each number of hops."""
    hops = sorted({record["run"]["task"]["hops"] for record in records})
    figure, panels = plt.subplots(1, len(hops), figsize=(4.6 * len(hops), 3.2), squeeze=False, sharey=True)
    for panel, p in zip(panels[0], hops, strict=True):
        for row, name in _NAMES.items():
            for record in records:
                if record["run"]["row"] == row and record["run"]["task"]["hops"] == p:
                    panel.plot(*_last_exit(record), label=name)
        panel.set(title=f"{p} hop{'s' * (p > 1)}: {p + 1} layers must cooperate", xlabel="batches")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("accuracy of the last exit")
    panels[0][-1].legend(fontsize=8, loc="lower right")
    figure.suptitle("p-hop induction, four stages of one layer", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_text(records: Sequence[Record], path: Path) -> None:
    """Held-out loss of the last exit over batches, one line a strategy (first seed, K = 4, all layers)."""
    layers, steps = (max(record["run"][key] for record in records) for key in ("layers", "steps"))
    figure, panel = plt.subplots(figsize=(7, 4.2))
    for record in records:
        run = record["run"]
        if (run["seed"], run["layers"], run["steps"]) == (0, layers, steps) and run["stages"] == 4:
            panel.plot(*_last_exit(record), label=run["row"])
    panel.set(xlabel="batches", ylabel="held-out loss of the last exit (nats)")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_gap(
    ends: Mapping[str, Mapping[int, Mapping[int, float]]], probed: Mapping[str, Sequence[float]], path: Path
) -> None:
    """Left: rows against the first one over tokens, at the same seeds. Right: what layers know of the next token.

    Args:
        ends: row → batches → seed → held-out loss; the first row is what others are measured against.
        probed: row → held-out loss of a fresh readout behind each layer; without any there is no right panel.
        path: of the figure.
    """
    figure, panels = plt.subplots(1, 2 if probed else 1, figsize=(9.6 if probed else 5.6, 3.6), squeeze=False)
    (baseline, against), *others = ends.items()
    panel = panels[0][0]
    for row, of in others:
        ratios = {n: [100 * (of[n][s] / against[n][s] - 1) for s in of[n] if s in against[n]] for n in of}
        batches = sorted(n for n, found in ratios.items() if found)
        means = [sum(ratios[n]) / len(ratios[n]) for n in batches]
        spread = [[m - min(ratios[n]) for n, m in zip(batches, means, strict=True)],
                  [max(ratios[n]) - m for n, m in zip(batches, means, strict=True)]]  # fmt: skip
        panel.errorbar([1.024e-3 * n for n in batches], means, yerr=spread, marker="o", capsize=3, label=row)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set(xlabel="tokens (millions)", ylabel=f"last exit against {baseline} (%)", xscale="log")
    panel.set_xticks([1.024e-3 * n for n in against], [f"{1.024e-3 * n:.1f}" for n in against], minor=False)
    panel.minorticks_off()
    panel.legend(fontsize=8)
    for row, losses in probed.items():
        panels[0][1].plot(range(len(losses)), losses, marker="o", label=row)
    if probed:
        panels[0][1].set(xlabel="decoder layers (0: the embedding)", ylabel="held-out loss of a fresh readout (nats)")
        panels[0][1].legend(fontsize=8)
    for each in panels[0]:
        each.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _last_exit(record: Record) -> tuple[list[int], list[float]]:
    return [step for step, _ in record["curve"]], [values[-1] for _, values in record["curve"]]
