"""The rows of the second study: eight layers of width 96, a vocabulary of 4096, mixed text; the most important first.

    python -m benchmarks.quality.corpus --out data/corpus
    python scripts/prepare_data.py --input data/corpus --out data/large --vocab-size 4096
    python -m benchmarks.quality rates        # learning rates, short trainings
    python -m benchmarks.quality late_rates
    python -m benchmarks.quality longer_rates # do half the rates win when trainings are long?
    python -m benchmarks.quality large        # one seed of all rows after the other
    python -m benchmarks.quality heads

All of them go on where they were stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.quality.records import Record, load
from benchmarks.quality.run import Run

LARGE = "data/large"
SEEDS = (0, 1, 2)
LAYERS, WIDTH, VOCABULARY = 8, 96, 4096
RATES = (4e-3, 2e-3, 8e-3, 1e-3, 5e-4)
STEPS_OF_RATES, STEPS = 1000, 4000
FLATTENED = (1000, 2000, 8000)
"""Batches of further trainings: what another doubling of the tokens would bring."""
LONGEST = 16000
"""Batches of two more rows: how far from flat the curve still is, and whether the order of the rows holds."""


BACKPROPAGATION = "backpropagation"
_NAMES = {"Muon": "Muon", "SOAP": "basis rotation"}


@dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        stages: K; 1 where the number of stages doesn't change what is learned.
        block: of interlocking.
        delay, optimizer: of asynchronous backpropagation.
        priced: K of the pipeline that would run it, if that is not ``stages`` or 4; late gradients are for M = 4.
        like: the row whose learning rate it takes; None: its rates are tried.
        whole: the row that differs in having whole private heads.
    """

    stages: int
    block: dict[str, Any]
    like: str | None = None
    delay: int | None = None
    optimizer: str = "AdamW"
    priced: int | None = None
    whole: str | None = None

    @property
    def exact(self) -> str:
        """Backpropagation with the row's optimizer; Nesterov's Adam corrects late gradients, so it is AdamW's rival."""
        return (
            BACKPROPAGATION if self.optimizer in ("AdamW", "NAdam") else f"{BACKPROPAGATION}, {_NAMES[self.optimizer]}"
        )

    @property
    def pipeline(self) -> int:
        """Stages of the pipeline whose time is predicted."""
        return self.priced or max(self.stages, 4)


def modules(exits: Any, *, width: int = 1, mode: str = "window", **more: Any) -> dict[str, Any]:
    """Losses on some stages; by default each module of stages is trained by its own loss only."""
    names: dict[int, dict[str, Any]] = {1: {"strategy": "local"}, 2: {"strategy": "pairwise"}}
    head = {"readout": "private", **more.pop("aux_head", {})}
    kind = names.get(width, {"strategy": "nwise", "width": width})
    return {**kind, "mode": mode, "exits": exits, "aux_head": head, **more}


def then_backpropagation(block: dict[str, Any], stages: int, share: float, steps: int = STEPS) -> dict[str, Any]:
    """A block for a part of the batches, then ordinary backpropagation."""
    return {**block, "schedule": [{"from_step": round(share * steps), "width": stages, "mode": "furthest"}]}


_ALL = {"strategy": "global"}
_MODULES, _PAIRWISE, _LOCAL, _TWO = "G = 4, K = 8", "pairwise, K = 4", "local, K = 4", "G = 2, K = 4"
HEADLINES: dict[str, Row] = {
    BACKPROPAGATION: Row(1, _ALL),
    _MODULES: Row(8, modules(4)),
    _PAIRWISE: Row(4, modules("every", width=2)),
    _TWO: Row(4, modules(2), _MODULES),
    _LOCAL: Row(4, modules("every")),
    "asynchronous, 1 batch late": Row(1, _ALL, delay=1),
    "asynchronous, 1 batch late, Nesterov": Row(1, _ALL, delay=1, optimizer="NAdam"),
    "backpropagation, Muon": Row(1, _ALL, delay=0, optimizer="Muon"),
    "asynchronous, 1 batch late, Muon": Row(1, _ALL, delay=1, optimizer="Muon"),
    "G = 4, K = 8, Muon": Row(8, modules(4), optimizer="Muon"),
    "pairwise, K = 4, Muon": Row(4, modules("every", width=2), "G = 4, K = 8, Muon", optimizer="Muon"),
    "G = 2, K = 8": Row(8, modules(2), _LOCAL),
    "pairwise, K = 8": Row(8, modules("every", width=2), _PAIRWISE),
    "borrow 1, K = 4": Row(4, modules("every", aux_head={"borrow": 1}), _LOCAL),
    "pairs of modules: G = 2, N = 2, K = 8": Row(8, modules(2, width=2), _PAIRWISE),
    "local, K = 8": Row(8, modules("every"), _LOCAL),
    "3-wise, K = 8": Row(8, modules("every", width=3), _PAIRWISE),
}
OVER_TOKENS = (BACKPROPAGATION, _MODULES, _PAIRWISE, _LOCAL)
"""Rows that are trained with fewer and more batches too."""
LONGER = (
    BACKPROPAGATION,
    _MODULES,
    "backpropagation, Muon",
    "G = 4, K = 8, Muon",
    "asynchronous, 1 batch late, Muon",
    "asynchronous, 2 batches late, Muon",
    "G = 4, 1 batch late, K = 8, Muon",
    "asynchronous, 1 batch late, Nesterov",
    _PAIRWISE,
    _LOCAL,
)
"""Rows that are trained as long at half their rate."""
_CENTRAL = 12
"""So many headlines come first at all seeds: what the recipe rests on."""
FURTHER: dict[str, Row] = {
    "G = 4, backpropagation from 85%, K = 8": Row(8, then_backpropagation(modules(4), 8, 0.85), _MODULES),
    "G = 4, backpropagation from 70%, K = 8": Row(8, then_backpropagation(modules(4), 8, 0.70), _MODULES),
    "G = 4, backpropagation from 85%, K = 8, Muon": Row(
        8, then_backpropagation(modules(4), 8, 0.85), "G = 4, K = 8, Muon", optimizer="Muon"
    ),
    "G = 4, backpropagation from 70%, K = 8, Muon": Row(
        8, then_backpropagation(modules(4), 8, 0.70), "G = 4, K = 8, Muon", optimizer="Muon"
    ),
    "pairwise, backpropagation from 60%, K = 8": Row(
        8, then_backpropagation(modules("every", width=2), 8, 0.6), _PAIRWISE
    ),
    "pairwise, backpropagation from 75%, K = 8": Row(
        8, then_backpropagation(modules("every", width=2), 8, 0.75), _PAIRWISE
    ),
    "3-wise, backpropagation from 75%, K = 8": Row(
        8, then_backpropagation(modules("every", width=3), 8, 0.75), _PAIRWISE
    ),
    "asynchronous, 2 batches late": Row(1, _ALL, "asynchronous, 1 batch late", delay=2, priced=8),
    "asynchronous, 2 batches late, Nesterov": Row(
        1, _ALL, "asynchronous, 1 batch late, Nesterov", delay=2, optimizer="NAdam", priced=8
    ),
    "backpropagation, Nesterov": Row(1, _ALL, delay=0, optimizer="NAdam"),
    "asynchronous, 2 batches late, Muon": Row(
        1, _ALL, "asynchronous, 1 batch late, Muon", delay=2, optimizer="Muon", priced=8
    ),
    "G = 4, 1 batch late, K = 8, Muon": Row(8, modules(4), "G = 4, K = 8, Muon", delay=1, optimizer="Muon"),
    "G = 4, 1 batch late, K = 8, Nesterov": Row(
        8, modules(4), "asynchronous, 1 batch late, Nesterov", delay=1, optimizer="NAdam"
    ),
    "G = 2, K = 8, Muon": Row(8, modules(2), "G = 4, K = 8, Muon", optimizer="Muon"),
    "backpropagation, basis rotation": Row(1, _ALL, delay=0, optimizer="SOAP"),
    "asynchronous, 1 batch late, basis rotation": Row(1, _ALL, delay=1, optimizer="SOAP"),
    "asynchronous, 2 batches late, basis rotation": Row(
        1, _ALL, "asynchronous, 1 batch late, basis rotation", delay=2, optimizer="SOAP", priced=8
    ),
    "G = 4, head of a slow copy of the next layer, K = 8": Row(
        8, modules(4, aux_head={"objective": "momentum"}), _MODULES
    ),
    "local, heads of slow copies of the next layer, K = 4": Row(
        4, modules("every", aux_head={"objective": "momentum"}), _LOCAL
    ),
    "exits on stages 4 and 7, K = 8": Row(8, modules([4, 7]), _MODULES),
    "exits on stages 2 and 7, K = 8": Row(8, modules([2, 7]), _MODULES),
    "G = 2, borrow 1, K = 4": Row(4, modules(2, aux_head={"borrow": 1}), _MODULES),
    "3-wise, K = 4": Row(4, modules("every", width=3), _PAIRWISE),
    "sum, K = 8": Row(8, {**_ALL, "mode": "sum"}, BACKPROPAGATION),
    "local, two blocks in the heads, copied LM heads, K = 4": Row(
        4, modules("every", aux_head={"readout": "shared", "blocks": 2, "refresh_interval": 10}), _LOCAL
    ),
    "local, half of the micro-batches pairwise, K = 4": Row(
        4, modules("every", mixed={"width": 2, "fraction": 0.5}), _LOCAL
    ),
}
_CHEAP: dict[str, dict[str, Any]] = {
    "256 negatives": {"negatives": 256},
    "loss on 1/4 of the positions": {"aux_tokens": 0.25},
    "copied LM heads": {"readout": "shared"},
    "copied LM heads, 1024 negatives": {"readout": "shared", "negatives": 1024},
    "copied LM heads, 2048 negatives": {"readout": "shared", "negatives": 2048},
    "rank 24": {"rank": 24},
    "64 negatives": {"negatives": 64},
    "label smoothing": {"objective": "label_smoothing"},
    "similarity matching": {"objective": "predsim"},
    "reconstruction": {"objective": "reconstruction"},
    "distillation": {"objective": "distillation"},
    "local critic": {"objective": "local_critic"},
    "stochastic layer-wise": {"objective": "stochastic_layerwise"},
    "1024 negatives": {"negatives": 1024},
    "512 negatives": {"negatives": 512},
    "256 negatives, uniform": {"negatives": 256, "negatives_by": "uniform"},
    "loss on 1/2 of the positions": {"aux_tokens": 0.5},
    "loss on 1/16 of the positions": {"aux_tokens": 1 / 16},
}
"""Heads that cost less than a product with the whole vocabulary at every position (4096 tokens; width 96)."""
_OF_MODULES = (
    "256 negatives",
    "1024 negatives",
    "copied LM heads",
    "copied LM heads, 1024 negatives",
    "copied LM heads, 2048 negatives",
    "rank 24",
    "loss on 1/4 of the positions",
)
HEADS: dict[str, Row] = {
    f"{whole}, {name}": Row(4, modules(exits, aux_head=options), like, whole=whole)
    for whole, exits, like, heads in (
        (_TWO, 2, _MODULES, _OF_MODULES),
        (_LOCAL, "every", _LOCAL, tuple(_CHEAP)),
    )
    for name, options in ((name, _CHEAP[name]) for name in heads)
}
ROWS = {**HEADLINES, **FURTHER, **HEADS}
TUNED = [name for name, row in ROWS.items() if row.like is None]
"""Rows whose learning rates are tried; others take the rate of the one that is most like them."""


def large_run(
    row: str,
    *,
    rate: float,
    seed: int = 0,
    shape: str = "decay",
    steps: int = STEPS,
    study: str,
    layers: int = LAYERS,
    width: int = WIDTH,
) -> Run:
    """A training: 1024 tokens a batch."""
    of = ROWS[row]
    return Run(
        study=study,
        row=row,
        interlocking=of.block,
        task={"folder": LARGE},
        stages=of.stages,
        layers=layers,
        rate=rate,
        steps=steps,
        seed=seed,
        width=width,
        head_size=32,
        batch=8,
        micro_batches=2 if "mixed" in of.block else 1,
        cosine=shape == "cosine",
        decay=0.25 if shape == "decay" else 0.0,
        evaluations=4,
        delay=of.delay,
        optimizer=of.optimizer,
        probes=steps == FLATTENED[-1],
    )


def rates(results: Path) -> Iterator[Run]:
    """Short trainings at five learning rates; backpropagation with both shapes of the schedule."""
    for rate in RATES:
        for row in (BACKPROPAGATION, _MODULES, _PAIRWISE, _LOCAL):
            yield large_run(row, rate=rate, steps=STEPS_OF_RATES, study="rates")
        yield large_run(BACKPROPAGATION, rate=rate, shape="cosine", steps=STEPS_OF_RATES, study="rates")


def late_rates(results: Path) -> Iterator[Run]:
    """The same for asynchronous backpropagation and the other optimizers; Muon's best rates are higher."""
    late = [row for row in TUNED if ROWS[row].delay is not None or ROWS[row].optimizer != "AdamW"]
    for rate, row in product((4e-3, 2e-3, 8e-3, 1e-3, 5e-4), late):
        if rate != (8e-3 if ROWS[row].optimizer in ("AdamW", "NAdam") else 5e-4):
            yield large_run(row, rate=rate, steps=STEPS_OF_RATES, study="late_rates")


def longer_rates(results: Path) -> Iterator[Run]:
    """Half the rates that won in the short trainings, for as many batches as rows are compared at."""
    for seed, row in product(SEEDS, LONGER):
        for run in _runs([(row, {"seed": seed})], results, "longer_rates"):
            yield replace(run, rate=run.rate / 2)


def best_rate(records: list[Record], row: str) -> float | None:
    """The rate with which a row, or the tuned one that it takes it from, ended lowest; None if none was tried."""
    return lowest_rate(records, ROWS[row].like or row)


def lowest_rate(records: list[Record], row: str) -> float | None:
    """The rate with which a row's trainings with a decay ended lowest; None if there are none."""
    ends = {
        record["run"]["rate"]: record["curve"][-1][1][-1]
        for record in records
        if record["run"]["row"] == row and record["run"]["decay"]
    }
    return min(ends, key=lambda rate: ends[rate], default=None)


def large(results: Path) -> Iterator[Run]:
    """One seed of the headlines, what more tokens would bring, the other seeds, then the further rows.

    Rows whose rates have not been tried yet are left out.
    """
    order: list[tuple[str, dict[str, Any]]] = [(row, {}) for row in HEADLINES]
    order += [(BACKPROPAGATION, {"shape": "cosine"})]
    order += [(BACKPROPAGATION, {"steps": steps}) for steps in FLATTENED[:2]]
    rows = list(HEADLINES)
    order += [(row, {"seed": seed}) for seed, row in product(SEEDS[1:], rows[:_CENTRAL])]
    order += [(row, {"steps": FLATTENED[2]}) for row in OVER_TOKENS]
    order += [(row, {"steps": LONGEST}) for row in OVER_TOKENS[:2]]
    order += [(row, {"seed": seed}) for seed, row in product(SEEDS[1:], rows[_CENTRAL:])]
    order += [(row, {"steps": LONGEST, "seed": seed}) for seed, row in product(SEEDS[1:], OVER_TOKENS[:2])]
    order += [(BACKPROPAGATION, {"seed": seed, "shape": "cosine"}) for seed in SEEDS[1:]]
    order += [(row, {"steps": steps}) for row in OVER_TOKENS[1:] for steps in FLATTENED[:2]]
    order += [(row, {}) for row in FURTHER]
    order += [(row, {"seed": seed}) for seed, row in product(SEEDS[1:], FURTHER)]
    yield from _runs(order, results, "large")


def heads(results: Path) -> Iterator[Run]:
    """What cheaper heads lose; first one seed of all."""
    yield from _runs([(row, {"seed": seed}) for seed, row in product(SEEDS, HEADS)], results, "heads")


def _runs(order: list[tuple[str, dict[str, Any]]], results: Path, study: str) -> Iterator[Run]:
    """Those whose rates have been tried."""
    tried = [*load(results / "rates.jsonl"), *load(results / "late_rates.jsonl")]
    for row, values in order:
        rate = best_rate(tried, row)
        if rate is not None:
            yield large_run(row, rate=rate, study=study, **values)
