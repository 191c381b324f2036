"""Objectives by name in real processes: cut language models against the reference, trained and evaluated."""

from __future__ import annotations

from typing import Any

from tests.launch import launch

HEADS: list[dict[str, Any]] = [
    {"objective": {"name": "label_smoothing", "smoothing": 0.2}, "aux_tokens": 0.5, "chunk_tokens": 5},
    {"objective": "label_smoothing", "readout": "shared", "refresh_interval": 2, "refresh_delay": 3},
    {"objective": {"name": "predsim", "beta": 0.7, "tokens": 12}, "aux_tokens": 0.5, "blocks": 1},
    {"objective": "predsim", "negatives": 20, "negatives_by": "uniform", "readout": "shared", "refresh_interval": 2},
    {"objective": {"name": "reconstruction", "weight": 0.6}, "aux_tokens": 0.5, "blocks": 1},
    {"objective": "reconstruction", "readout": "shared", "refresh_interval": 2, "chunk_tokens": 5},
    {"objective": {"name": "momentum", "interval": 2, "average": 0.5}, "negatives": 20, "negatives_by": "uniform"},
    {"objective": {"name": "momentum", "interval": 1, "delay": 3}, "readout": "shared", "refresh_interval": 2},
    {"objective": {"name": "stochastic_layerwise", "categories": 12, "dropout": 0.3}, "aux_tokens": 0.5, "blocks": 1},
    {"objective": "stochastic_layerwise", "negatives": 20, "negatives_by": "uniform", "readout": "shared"},
]


def test_equals_the_reference() -> None:
    """Losses, parameters after eight batches, an evaluation: 1e-5; an evaluation is the exits' cross-entropy."""
    cases = [
        {"task": "real", "interlocking": {"strategy": "pairwise", "mode": "window", "aux_head": head}, "tied": False}
        for head in HEADS
    ]
    # where updates give the gradients of inputs, which a loss of a stage's input must leave alone
    exact = {"strategy": "global", "aux_head": {"objective": "stochastic_layerwise"}}
    cases.append({"task": "real", "interlocking": exact, "tied": False})
    for rank, rows in enumerate(launch("readouts", 3, cases).check().reports):
        for case, row in zip(cases, rows, strict=True):
            assert max(row.values()) <= 1e-5, f"rank {rank}, {case}: {row}"
