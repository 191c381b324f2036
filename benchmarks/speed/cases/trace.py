"""What recording a trace costs: the same engine, batches recorded and not, in turn.

On stages that do nothing, where each stamp counts, and on a real Llama. CPU time of the training thread, because what a
stamp takes is less than what batches differ by on a busy machine. What follows the last recorded batch, gathering and
writing, is not in it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.speed.cases.compute import ADAM, batches
from benchmarks.speed.cases.overhead import Scale
from benchmarks.speed.contenders import Batch, Model, make
from benchmarks.speed.emulated import data as sleeping_data
from benchmarks.speed.harness import Row, Spread, interleaved, meet, spawn
from benchmarks.speed.language import llama
from benchmarks.speed.sleeping import loss_fn

_WORKS = ("nothing", "llama")


def seconds(engine: Any, rows: Iterator[Batch], measured: int, path: Path | None) -> float:
    """CPU time of this thread a micro-batch, on the rank that takes most; ``path``: of a trace of them and one more."""
    import torch.distributed as dist

    engine.train_batch(rows)
    if path is not None:
        engine.trace_batches(engine.global_steps + 1, engine.global_steps + measured + 1, path)
    dist.barrier()
    start = time.thread_time()
    for _ in range(measured):
        engine.train_batch(rows)
    elapsed = torch.tensor(time.thread_time() - start, dtype=torch.float64)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    if path is not None:
        engine.train_batch(rows)
    return elapsed.item() / measured / engine.micro_batches


def worker(arguments: dict[str, Any]) -> list[list[float]]:
    """One rank: batches that are not recorded, and batches that are."""

    torch.set_num_threads(1)
    meet()
    model, rows, size = _work(arguments)
    engine = make(arguments["contender"], model, arguments["stages"], arguments["micro_batches"], size)
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            partial(seconds, engine, rows, arguments["measured"], path) for path in (None, Path(folder) / "trace.json")
        ]
        times = interleaved(jobs, arguments["repeats"])
    return times


def _work(arguments: dict[str, Any]) -> tuple[Model, Iterator[Batch], int]:
    if arguments["work"] == "nothing":
        return Model([Scale] * (2 * arguments["stages"]), Scale, loss_fn), sleeping_data(), 1
    model = llama(layers=8, width=320, vocabulary=2048, settings=ADAM, mode="window")
    return model, batches(None, 2048, 2, 128), 2


COLUMNS: dict[str, Callable[[Row], str]] = {
    "stages do": lambda row: row["contender"],
    "K": lambda row: str(row["stages"]),
    "M": lambda row: str(row["micro_batches"]),
    "not recorded, CPU ms a micro-batch": lambda row: "{:.3f} ({:.3f} … {:.3f})".format(*row["off"]),
    "recorded": lambda row: "{:.3f} ({:.3f} … {:.3f})".format(*row["on"]),
    "cost, median of pairs": lambda row: f"{row['cost']:+.2%}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's options."""
    parser.add_argument("--work", nargs="+", choices=_WORKS, default=list(_WORKS), help="what stages do")
    parser.add_argument("--stages", type=int, default=2, help="K, pipeline stages")
    parser.add_argument("--micro-batches", type=int, default=4, help="M, micro-batches of a batch")
    parser.add_argument("--strategy", default="N=2", help="a contender of ours")
    parser.add_argument("--measured", type=int, default=8, help="batches a repeat")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved; medians count")


def run(args: argparse.Namespace) -> list[Row]:
    """A row for each kind of work."""
    rows: list[Row] = []
    for work in tqdm(args.work, desc="trace", unit="work"):
        numbers = {key: getattr(args, key) for key in ("stages", "micro_batches", "measured", "repeats")}
        off, on = spawn(args.stages, worker, {**numbers, "work": work, "contender": args.strategy})[0]
        ratios = [recorded / plain for plain, recorded in zip(off, on, strict=True)]
        rows.append(
            {
                "contender": work,
                "stages": args.stages,
                "micro_batches": args.micro_batches,
                "off": Spread.of(off).scaled(1e3),
                "on": Spread.of(on).scaled(1e3),
                "cost": round(Spread.of(ratios).median - 1, 4),
            }
        )
    return rows


def draw(rows: list[Row], path: Any) -> None:
    """Both times of each kind of work."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(rows), figsize=(2.6 * len(rows), 2.8), squeeze=False)
    for panel, row in zip(panels[0], rows, strict=True):
        panel.bar(["not recorded", "recorded"], [row["off"][0], row["on"][0]], color=["C0", "C1"])
        panel.set(title=f"stages do: {row['contender']}", ylabel="CPU ms a micro-batch")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
