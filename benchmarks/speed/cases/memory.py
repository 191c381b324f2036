"""Saved activations of a real Llama on each stage: how many micro-batches are alive, and how many bytes they hold.

Counted with autograd's hooks on saved tensors, heads included, over batches that follow each other without a pause, so
that the next batch's first forward pass counts too. The bound is the one of docs/how-it-works.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch

from benchmarks.speed.contenders import make
from benchmarks.speed.harness import Row, meet, spawn
from benchmarks.speed.language import llama
from benchmarks.speed.saved import SavedActivations


def worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank: each contender for some batches."""

    torch.set_num_threads(1)
    meet()
    stages, count, tokens = (arguments[key] for key in ("stages", "micro_batches", "tokens"))
    model = llama(2 * stages, arguments["width"], arguments["vocabulary"])
    ids = torch.arange(tokens)[None] % arguments["vocabulary"]
    results = {}
    for name in arguments["contenders"]:
        engine: Any = make(name, model, stages, count)
        saved = watch(engine)
        data = repeat((ids, ids))
        for _ in range(3):
            engine.train_batch(data)
        results[name] = {"peak": dict(saved.peak), "passes": dict(saved.peak_passes)}
    return results


def watch(engine: Any) -> SavedActivations:
    """Count what the trunk and the head of a stage save."""
    module = engine.module
    saved = SavedActivations(module.parameters())
    if not hasattr(module, "trunk"):  # DeepSpeed's
        module.forward = saved.watched("trunk", module.forward)
        engine.loss_model = saved.watched("head", module.loss_fn)
        module.loss_fn = engine.loss_model
        return saved
    module.trunk = saved.watched("trunk", module.trunk)
    if module.aux_head is not None:
        module.aux_head.forward = saved.watched("head", module.aux_head.forward)
    for objective in module.objectives.values():
        objective.loss_fn = saved.watched("head", objective.loss_fn)
    _watch_what_is_put_off(engine, saved)
    return saved


def _watch_what_is_put_off(engine: Any, saved: SavedActivations) -> None:
    """Count what weight gradients that wait are made of as the trunk's, too."""
    update, add = engine._update, engine._weight_gradients.add
    number = 0  # of the forward pass whose backward pass is at work

    def updating(*args: Any) -> None:
        nonlocal number
        number = saved.passes["trunk"].popleft()  # a strategy for all: micro-batches are updated in their order
        update(*args)

    engine._update = updating
    engine._weight_gradients.add = lambda work: add(saved.holding("trunk", number, work))


def _mib(value: float) -> str:
    return f"{value / 2**20:.2f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda row: row["contender"],
    "stage": lambda row: str(row["stage"]),
    "micro-batches in flight": lambda row: str(row["live"]),
    "bound": lambda row: str(row["bound"]),
    "trunk, MiB": lambda row: _mib(row["trunk_bytes"]),
    "with head, MiB": lambda row: _mib(row["total_bytes"]),
    "trunk against 1F1B": lambda row: f"{row['against_1f1b']:.2f}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's options."""
    parser.add_argument("--stages", type=int, default=8, help="K, pipeline stages")
    parser.add_argument("--micro-batches", type=int, default=16, help="M, micro-batches of a batch")
    parser.add_argument("--contenders", nargs="+", default=["N=1", "N=2", "G=4", "B-W", "1F1B"], help="1F1B among them")
    parser.add_argument("--width", type=int, default=64, help="hidden size")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a micro-batch")
    parser.add_argument("--vocabulary", type=int, default=512, help="V, its tokens")


def run(args: argparse.Namespace) -> list[Row]:
    """A row for each contender and stage."""
    by_rank = spawn(args.stages, worker, {key: getattr(args, key) for key in _ARGUMENTS})
    rows: list[Row] = []
    for name in args.contenders:
        for stage, of in enumerate(by_rank):
            peak, baseline = of[name]["peak"], of["1F1B"]["peak"]
            rows.append(
                {
                    "contender": name,
                    "stages": args.stages,
                    "micro_batches": args.micro_batches,
                    "stage": stage,
                    "live": of[name]["passes"]["trunk"],
                    "bound": bound(name, args.stages, args.micro_batches, stage),
                    "trunk_bytes": peak["trunk"],
                    "total_bytes": peak["total"],
                    "against_1f1b": round(peak["trunk"] / baseline["trunk"], 4),
                }
            )
    return rows


_ARGUMENTS = ("stages", "micro_batches", "contenders", "width", "tokens", "vocabulary")


def bound(name: str, stages: int, micro_batches: int, stage: int) -> int:
    """The most micro-batches that may be in flight."""
    from benchmarks.speed.predicted import strategy_of

    strategy = strategy_of(name, stages)
    assert strategy is not None, f"nobody knows how many micro-batches {name} keeps"
    return strategy.most_in_flight(stage, micro_batches)


def draw(rows: list[Row], path: Any) -> None:
    """Bytes over stages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6.4, 3.4))
    for name in dict.fromkeys(row["contender"] for row in rows):
        shown = [row for row in rows if row["contender"] == name]
        panel.plot([row["stage"] for row in shown], [row["total_bytes"] / 2**20 for row in shown], "o-", label=name)
    panel.set(xlabel="stage", ylabel="peak of saved activations (MiB)", ylim=0)
    panel.grid(alpha=0.3)
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
