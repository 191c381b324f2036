"""The real engines on stages that sleep: time per micro-batch and idle share, beside the limit and the prediction.

A unit of sleep is a stage's forward pass, its input gradient (B), or its weight gradient (W); a head costs 0.1
units. Every stage is two layers of half a unit, so that schedules with two chunks a rank cut it in two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.speed import predicted
from benchmarks.speed.contenders import PEERS, Batch, Model, applies, make
from benchmarks.speed.harness import Row, Spread, interleaved, meet, spawn
from benchmarks.speed.latency import delay_deepspeed, delay_engine
from benchmarks.speed.sleeping import HEAD_UNITS, WIDTH, Clock, SleepingHead, SleepingLayer, loss_fn

_FILL = 4  # micro-batches after which a pipeline that streams is in its stride


def model(stages: int, unit: float) -> Model:
    """Two layers a stage."""
    return Model(
        layers=[partial(SleepingLayer, unit / 2)] * (2 * stages),
        head=partial(SleepingHead, HEAD_UNITS * unit),
        loss_fn=loss_fn,
    )


def data() -> Iterator[Batch]:
    """The same micro-batch for ever."""
    return repeat((torch.zeros(1, WIDTH), torch.zeros(1, WIDTH)))


class Timed(NamedTuple):
    """What a batch took.

    Attributes:
        seconds: on the slowest rank.
        idle: share of them that this rank did not sleep.
        processor: seconds of a processor that this rank's engine took.
    """

    seconds: float
    idle: float
    processor: float


def time_batches(engine: Any, batches: int, warm_up: int = 1, rows: Iterator[Batch] | None = None) -> Timed:
    """The mean batch after ``warm_up`` batches."""
    import torch.distributed as dist

    rows = rows or data()
    dist.barrier()
    for _ in range(warm_up):
        engine.train_batch(rows)
    start, slept, processor = time.perf_counter(), Clock.slept, time.thread_time()
    for _ in range(batches):
        engine.train_batch(rows)
    elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    idle, own = 1 - (Clock.slept - slept) / elapsed.item(), time.thread_time() - processor
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return Timed(elapsed.item() / batches, idle, own / batches)


def worker(arguments: dict[str, Any]) -> list[list[Timed]]:
    """One rank: all contenders of one K and M, interleaved."""

    torch.set_num_threads(1)
    meet()
    stages, count, unit, latency = (arguments[key] for key in ("stages", "micro_batches", "unit", "latency"))
    contenders = []
    for name in arguments["contenders"]:
        engine = make(name, model(stages, unit), stages, count)
        if latency and name not in PEERS:
            delay_engine(engine, latency * unit)
        contenders.append(engine)
    if latency:
        delay_deepspeed(latency * unit)
    batches = max(2, arguments["measured"] // count)
    warm_up = max(1, _FILL // count)
    jobs = [partial(time_batches, engine, batches, warm_up) for engine in contenders]
    return interleaved(jobs, arguments["repeats"])


def measure(
    stages: int,
    micro_batches: int,
    contenders: list[str],
    *,
    unit: float,
    measured: int,
    repeats: int,
    latency: float = 0.0,
) -> list[Row]:
    """Rows of one K and M.

    Args:
        stages: K, processes.
        micro_batches: M.
        contenders: names, ``1F1B`` among them.
        unit: seconds.
        measured: micro-batches a repeat, at least two batches.
        repeats: of all contenders, interleaved.
        latency: units a message takes.
    """
    running = [name for name in contenders if applies(name, stages, micro_batches)]
    by_rank = spawn(
        stages,
        worker,
        {
            "stages": stages,
            "micro_batches": micro_batches,
            "contenders": running,
            "unit": unit,
            "latency": latency,
            "measured": measured,
            "repeats": repeats,
        },
    )
    rows: list[Row] = []
    for index, name in enumerate(running):
        units = Spread.of([of.seconds for of in by_rank[0][index]]).scaled(1 / micro_batches / unit)
        idle = [min(of.idle for of in rank[index]) for rank in by_rank]
        own = [median(of.processor for of in rank[index]) / micro_batches / unit for rank in by_rank]
        rows.append(
            {
                "stages": stages,
                "micro_batches": micro_batches,
                "latency": latency,
                "contender": name,
                "units": units,
                "idle": [round(share, 3) for share in idle],
                **predicted.predictions(name, stages, micro_batches, latency, units[1], own),
            }
        )
    peer = next(row["units"][0] for row in rows if row["contender"] == "1F1B")
    return [{**row, "speedup": round(peer / row["units"][0], 3)} for row in rows]


def _units(row: Row) -> str:
    median, low, high = row["units"]
    return f"{median:.2f} ({low:.2f} … {high:.2f})"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "K": lambda row: str(row["stages"]),
    "M": lambda row: str(row["micro_batches"]),
    "latency": lambda row: f"{row['latency']:g}",
    "": lambda row: row["contender"],
    "units a micro-batch": _units,
    "limit": lambda row: f"{row['limit']:.2f}",
    **predicted.COLUMNS,
    "against 1F1B": lambda row: f"{row['speedup']:.2f}×",
    "idle, busiest to idlest stage": lambda row: f"{min(row['idle']):.1%} … {max(row['idle']):.1%}",
}


def draw(rows: list[Row], path: Any) -> None:
    """Units a micro-batch over M, a panel for each K."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    across = "latency" if len({row["latency"] for row in rows}) > 1 else "micro_batches"
    stages = sorted({row["stages"] for row in rows})
    figure, panels = plt.subplots(1, len(stages), figsize=(4.4 * len(stages), 3.4), squeeze=False)
    for panel, k in zip(panels[0], stages, strict=True):
        for number, name in enumerate(dict.fromkeys(row["contender"] for row in rows)):
            points = [(row[across], row["units"][0]) for row in rows if (row["stages"], row["contender"]) == (k, name)]
            if points:
                dashes, colour = "--" if name in PEERS else "-", f"C{number}" if number < 10 else "black"
                panel.plot(*zip(*points, strict=True), dashes, marker="o", ms=4, color=colour, label=name)
        panel.set(title=f"K = {k}", xlabel="latency (units)" if across == "latency" else "micro-batches M")
        if across == "latency":
            panel.set_ylim(bottom=0)
        else:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.set_yticks([3, 4, 6, 8, 12, 16, 24], ["3", "4", "6", "8", "12", "16", "24"])
            panel.set_xticks(sorted({row["micro_batches"] for row in rows}), [])
            panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("units a micro-batch")
    panels[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
