"""The rows of each table: which trainings a study consists of, the most important first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.quality.records import Record, load
from benchmarks.quality.run import Run
from benchmarks.quality.sampling import sampling
from benchmarks.quality.second import heads, large, late_rates, longer_rates, rates
from benchmarks.quality.sizes import SIZES

TEXT = "data/quality"
SEEDS = (0, 1, 2)


def block(width: int, mode: str = "window", readout: str = "private", **more: Any) -> dict[str, Any]:
    """An interlocking block of width N with heads; ``more`` may hold ``aux_head`` options."""
    names = {1: {"strategy": "local"}, 2: {"strategy": "pairwise"}}
    heads = {"readout": readout, **more.pop("aux_head", {})}
    return {**names.get(width, {"strategy": "nwise", "width": width}), "mode": mode, "aux_head": heads, **more}


def backpropagation() -> dict[str, Any]:
    """Global, with heads that only watch (their gradient reaches no trunk)."""
    return {"strategy": "global", "mode": "furthest", "aux_head": {}}


def hop_rows(stages: int) -> dict[str, dict[str, Any]]:
    """Modules of half the stages, then every width, mode and readout at K stages, and heads with a block."""
    rows = {
        "global": backpropagation(),
        "local, private": block(1),
        "local, shared": block(1, readout="shared"),
        "local, shared, 1 block": block(1, readout="shared", aux_head={"blocks": 1}),
        **{f"modules of {g}, shared": block(1, readout="shared", exits=g) for g in (2, 4) if g < stages},
    }
    for n, mode, readout in product(range(2, stages + 1), ("window", "furthest"), ("shared", "private")):
        if not (n == stages and mode == "furthest"):  # that is global
            rows[f"{n}-wise {mode}, {readout}"] = block(n, mode, readout)
    return rows


HOP_ROWS = hop_rows(4)
HOP_HEADLINES = (
    "global",
    "local, shared",
    "modules of 2, shared",
    "2-wise window, shared",
    "3-wise window, shared",
    "local, shared, 1 block",
    "local, private",
    "2-wise window, private",
)
STEPS = {1: 1500, 2: 2500, 3: 3000, 4: 3000}


def hop(row: str, interlocking: dict[str, Any], hops: int, seed: int, stages: int = 4, study: str = "hops") -> Run:
    """A training on p-hop induction, one layer a stage: 1024 tokens a batch, until solved."""
    return Run(
        study=study,
        row=row,
        interlocking=interlocking,
        task={"hops": hops},
        stages=stages,
        layers=stages,
        rate=3e-3,
        steps=STEPS[hops],
        seed=seed,
        until_solved=True,
        evaluations=STEPS[hops] // 100,
    )


def check(results: Path) -> Iterator[Run]:
    """The standing check of a few minutes: does a wider reach build a longer circuit?"""
    rows = ("local, shared", "modules of 2, shared", "2-wise window, shared", "3-wise window, shared", "global")
    for p, row in product((1, 2), rows):
        yield hop(row, HOP_ROWS[row], p, seed=0, study="check")


def hops(results: Path) -> Iterator[Run]:
    """All of p = 1 … 4, K = 4 and 8, each once; first what says most: one seed of all rows, more of the headlines."""
    parts: list[tuple[int, int, int, Iterable[str]]] = [(4, p, 0, HOP_ROWS) for p in (1, 2)]
    parts += [(4, p, seed, HOP_HEADLINES) for seed in SEEDS[1:] for p in (2, 1)]
    parts += [(4, 3, 0, HOP_HEADLINES), (8, 2, 0, HOP_HEADLINES[:5]), (4, 4, 0, HOP_HEADLINES[:5])]
    parts += [(8, p, 0, [*HOP_HEADLINES[:5], "modules of 4, shared"]) for p in (1, 2, 3, 4)]
    everything = product((4, 8), (1, 2, 3, 4), SEEDS)
    parts += [(stages, p, seed, hop_rows(stages)) for stages, p, seed in everything]
    seen = set()
    for stages, p, seed, rows in parts:
        for row in rows:
            run = hop(row, hop_rows(stages)[row], p, seed, stages)
            if run.id not in seen:
                seen.add(run.id)
                yield run


TEXT_ROWS: dict[str, dict[str, Any]] = {
    "global": backpropagation(),
    "local, private": block(1),
    "local, shared": block(1, readout="shared"),
    "local, shared, 1 block": block(1, readout="shared", aux_head={"blocks": 1}),
    "pairwise window, private": block(2),
    "pairwise window, shared": block(2, readout="shared"),
    "3-wise window, private": block(3),
    "3-wise window, shared": block(3, readout="shared"),
    "pairwise furthest, private": block(2, "furthest"),
    "pairwise furthest, shared": block(2, "furthest", "shared"),
    "local + half pairwise, shared": block(1, readout="shared", mixed={"width": 2, "fraction": 0.5}),
    "local + global every 4th, shared": block(1, readout="shared", global_interval=4),
}
HEADLINES = [
    "global",
    "local, private",
    "local, shared",
    "local, shared, 1 block",
    "pairwise window, private",
    "pairwise window, shared",
]
STEPS_OF_SWEEP, STEPS_OF_TEXT = 750, 2000
WIDEN_AT = round(0.6 * STEPS_OF_TEXT)
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {  # with the row whose learning rate they take
    "pairwise window 0.2/0.8, private": (block(2, window_weights=[0.2, 0.8]), "pairwise window, private"),
    "pairwise window 0.8/0.2, private": (block(2, window_weights=[0.8, 0.2]), "pairwise window, private"),
    "local, then global, private": (
        block(1, schedule=[{"from_step": WIDEN_AT, "width": 4, "mode": "furthest"}]),
        "local, private",
    ),
    "local, then pairwise, private": (block(1, schedule=[{"from_step": WIDEN_AT, "width": 2}]), "local, private"),
}
RATES = (8e-3, 16e-3, 4e-3)


def sweep(results: Path) -> Iterator[Run]:
    """Short trainings at three learning rates: every row on one layer a stage, the headlines on two, the controls."""
    for rate in RATES:
        for row, interlocking in TEXT_ROWS.items():
            yield text(row, interlocking, rate=rate, steps=STEPS_OF_SWEEP, study="sweep")
        for layers in (1, 2, 3):
            yield shallow(layers, rate=rate, steps=STEPS_OF_SWEEP, study="sweep")
    for rate, row in product(RATES, HEADLINES):
        yield text(row, TEXT_ROWS[row], rate=rate, layers=8, steps=STEPS_OF_SWEEP, study="sweep")


def texts(results: Path) -> Iterator[Run]:
    """One layer a stage, K = 4: every row at its best rate, the controls, more seeds for the headlines."""
    rates = best_rates(load(results / "sweep.jsonl"))
    for row, interlocking in TEXT_ROWS.items():
        yield text(row, interlocking, rate=rates[row, 4])
    for layers in (1, 2, 3):
        yield shallow(layers, rate=rates["global", layers])
    for share in (0.5, 0.6, 0.75, 1.2):  # what global reaches in a part of the time, with a schedule of that length
        yield text("global", TEXT_ROWS["global"], rate=rates["global", 4], steps=round(share * STEPS_OF_TEXT))
    for row, (interlocking, tuned) in VARIANTS.items():
        yield text(row, interlocking, rate=rates[tuned, 4])
    for seed, row in product(SEEDS[1:], HEADLINES):
        yield text(row, TEXT_ROWS[row], rate=rates[row, 4], seed=seed)


DEEP_ROWS = {**TEXT_ROWS, "4-wise window, private": block(4)}


def deep(results: Path) -> Iterator[Run]:
    """Eight layers: the headlines at K = 4, the controls, the best and the worst at K = 8 and 2."""
    rates = best_rates(load(results / "sweep.jsonl"))

    def run(row: str, **values: Any) -> Run:
        rate = rates[row if row in HEADLINES else "pairwise window, private", 8]
        return text(row, DEEP_ROWS[row], rate=rate, layers=8, study="deep", **values)

    yield run("global")
    yield run("pairwise window, private")
    yield run("local, private")
    yield shallow(2, rate=rates["global", 2], study="deep")
    yield run("global", steps=round(0.6 * STEPS_OF_TEXT))
    yield run("pairwise window, private", stages=8)
    yield run("local, private", stages=8)
    yield run("3-wise window, private", stages=8)
    yield run("4-wise window, private", stages=8)
    yield shallow(4, rate=rates["global", 2], study="deep")
    yield run("3-wise window, private")
    yield run("local, shared")
    yield run("pairwise window, shared")
    yield run("local, shared, 1 block")
    yield run("local, private", stages=2)
    yield run("local, shared", stages=8)
    yield run("local, shared", stages=2)
    yield run("pairwise window, private", stages=2)
    for share in (0.4, 0.8):
        yield run("global", steps=round(share * STEPS_OF_TEXT))


def seeds(results: Path) -> Iterator[Run]:
    """Eight layers again, three seeds: the headlines, and backpropagation at a rate that decays at the end only."""
    rows = (
        ("global", 4),
        ("local, private", 4),
        ("local, private", 2),
        ("pairwise window, private", 4),
        ("pairwise window, private", 8),
        ("3-wise window, private", 8),
    )
    common: dict[str, Any] = {"rate": RATES[0], "layers": 8, "study": "seeds"}
    for row, stages in rows:
        for seed in SEEDS:
            yield text(row, DEEP_ROWS[row], stages=stages, seed=seed, **common)
    decayed: dict[str, Any] = {**common, "cosine": False, "decay": 0.25}
    for row, stages in (("global", 4), ("local, private", 2), ("pairwise window, private", 4), ("local, private", 4)):
        for seed in SEEDS:
            yield text(f"{row}, constant, then decay", DEEP_ROWS[row], stages=stages, seed=seed, **decayed)


def borrow(results: Path) -> Iterator[Run]:
    """Borrowed depth against private blocks and pairwise, stages of three layers: text, then hops."""
    rows = {
        "global": backpropagation(),
        "local, shared": block(1, readout="shared"),
        "local, shared, borrows 1 (window)": block(1, readout="shared", aux_head={"borrow": 1}),
        "local, shared, 1 block": block(1, readout="shared", aux_head={"blocks": 1}),
        "pairwise window, shared": block(2, readout="shared"),
        "local, shared, borrows 2 (window)": block(1, readout="shared", aux_head={"borrow": 2}),
        "local, shared, 2 blocks": block(1, readout="shared", aux_head={"blocks": 2}),
        "local, shared, borrows 1 (furthest)": block(1, "furthest", "shared", aux_head={"borrow": 1}),
    }
    names = list(rows)
    for part in (names[:5], names[5:]):
        for row in part:
            yield text(row, rows[row], rate=8e-3, stages=3, layers=9, study="borrow")
        for hops, row in product((4, 3), part):
            yield replace(hop(row, rows[row], hops, seed=0, stages=2, study="borrow"), layers=6)


NOISE = 0.05  # nats: what seeds differ by after the sweep's few batches


def best_rates(records: list[Record]) -> dict[tuple[str, int], float]:
    """(row, layers) → the rate to train longer with: the first of RATES, unless another one ended lower by NOISE."""
    ends: dict[tuple[str, int], dict[float, float]] = {}
    for record in records:
        run = record["run"]
        ends.setdefault((run["row"], run["layers"]), {})[run["rate"]] = record["curve"][-1][1][-1]
    chosen = {}
    for key, of in ends.items():
        best = min(of, key=lambda rate: of[rate])
        chosen[key] = best if of[best] < of.get(RATES[0], float("inf")) - NOISE else RATES[0]
    return chosen


def shallow(layers: int, **values: Any) -> Run:
    """Global on the first layers only: a control, whose loss says what depth is worth."""
    return text("global", backpropagation(), layers=layers, stages=1, **values)


def text(row: str, interlocking: dict[str, Any], *, rate: float, study: str = "text", **values: Any) -> Run:
    """A training on text: 1024 tokens a batch."""
    defaults: dict[str, Any] = {
        "stages": 4,
        "layers": 4,
        "steps": STEPS_OF_TEXT,
        "seed": 0,
        "width": 32,
        "batch": 8,
        "micro_batches": 2 if "mixed" in interlocking else 1,
        "cosine": True,
        "evaluations": 6,
        "task": {"folder": TEXT},
    }
    return Run(study=study, row=row, interlocking=interlocking, rate=rate, **{**defaults, **values})


def stuck(results: Path) -> Iterator[Run]:
    """Why furthest sticks on text: what helps, and whether its gradients agree with the last loss's."""
    for readout in ("private", "shared"):
        for row, interlocking in {
            "local": block(1, readout=readout),
            "window": block(2, readout=readout),
            "furthest": block(2, "furthest", readout),
            "furthest, 1 block": block(2, "furthest", readout, aux_head={"blocks": 1}),
        }.items():
            yield text(f"{row}, {readout}", interlocking, rate=8e-3, steps=STEPS_OF_SWEEP, cosines=True, study="stuck")
    changes: dict[str, dict[str, Any]] = {
        "a quarter of the rate": {"rate": 2e-3},
        "no weight decay": {"options": {"weight_decay": 0.0}},
        "three times the steps": {"steps": 3 * STEPS_OF_SWEEP},
    }
    for name, change in changes.items():
        values: dict[str, Any] = {"rate": 8e-3, "steps": STEPS_OF_SWEEP, "cosines": True, "study": "stuck"} | change
        yield text(f"furthest, private, {name}", block(2, "furthest"), **values)


PLANS: dict[str, Callable[[Path], Iterator[Run]]] = {
    "check": check,
    "hops": hops,
    "sweep": sweep,
    "text": texts,
    "deep": deep,
    "stuck": stuck,
    "borrow": borrow,
    "seeds": seeds,
    "rates": rates,
    "late_rates": late_rates,
    "longer_rates": longer_rates,
    "large": large,
    "heads": heads,
    "sampling": sampling,
    **SIZES,
}
