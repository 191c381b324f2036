"""Slow links: every stage on a host of its own (a network namespace), the links limited by tc, real sockets.

Stages sleep instead of computing, hidden states are real: what is lost is what the links cost. Loss is against the same
contender on links without a limit. Needs root; without it nothing is measured, and that is said.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.speed.contenders import Batch, make
from benchmarks.speed.emulated import model, time_batches
from benchmarks.speed.harness import Row, Spread, add_timing_arguments, interleaved
from benchmarks.speed.namespaces import hosts, missing
from benchmarks.speed.sleeping import WIDTH

_SECONDS = 900


def data(kib: int) -> Iterator[Batch]:
    """Hidden states of that size, for ever the same."""
    states = torch.zeros(1, kib * 1024 // 4 // WIDTH, WIDTH)
    return repeat((states, states))


def worker(arguments: dict[str, Any]) -> list[list[tuple[float, float]]]:
    """One stage: all contenders, interleaved."""
    import deepspeed
    import torch.distributed as dist

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    deepspeed.utils.logger.setLevel("ERROR")
    stages, count, unit = (arguments[key] for key in ("stages", "micro_batches", "unit"))
    batches = max(2, arguments["measured"] // count)
    jobs = []
    for name in arguments["contenders"]:
        engine = make(name, model(stages, unit), stages, count)
        jobs.append(partial(time_batches, engine, batches, rows=data(arguments["kib"])))
    measured = interleaved(jobs, arguments["repeats"])
    dist.barrier()
    return measured


def launch(arguments: dict[str, Any], megabits: float | None) -> list[list[tuple[float, float]]]:
    """All stages on their hosts; what the first one measured."""
    with hosts(arguments["stages"], megabits) as made, tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "WORLD_SIZE": str(len(made)),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": made[0].address,
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": made[0].interface,
        }
        result = Path(folder) / "result.json"
        words = [sys.executable, "-m", "benchmarks.speed.cases.links", json.dumps(arguments), str(result)]
        processes = [
            subprocess.Popen(
                host.command(*words),
                env={**environment, "RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, host in enumerate(made)
        ]
        try:
            said = [process.communicate(timeout=_SECONDS)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        failed = next((rank for rank, process in enumerate(processes) if process.returncode), None)
        if failed is not None:
            raise RuntimeError(f"stage {failed} ended with code {processes[failed].returncode}:\n{said[failed]}")
        measured: list[list[tuple[float, float]]] = json.loads(result.read_text())
        return measured


def _mib(row: Row) -> str:
    return f"{row['kib'] / 1024:g}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "Mb/s": lambda row: "no limit" if row["megabits"] is None else f"{row['megabits']:g}",
    "MiB a message": _mib,
    "": lambda row: row["contender"],
    "units a micro-batch": lambda row: "{:.2f} ({:.2f} … {:.2f})".format(*row["units"]),
    "throughput lost": lambda row: f"{row['lost']:.1%}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's options."""
    parser.add_argument("--stages", type=int, default=4, help="K")
    parser.add_argument("--micro-batches", type=int, default=8, help="M")
    parser.add_argument("--megabits", type=float, nargs="+", default=[1000, 200, 50], help="rates of the links")
    parser.add_argument("--kib", type=int, default=416, help="of a hidden state")
    names = ["N=1", "N=2", "N=2 slack 1", "N=2 slack 2", "1F1B"]
    parser.add_argument("--contenders", nargs="+", default=names, help="slack: hop_slack")
    add_timing_arguments(parser, unit=0.05, measured=16)


def run(args: argparse.Namespace) -> list[Row]:
    """All rates, without a limit first."""
    reason = missing()
    if reason is not None:
        print(f"slow links are not measured: {reason}.", file=sys.stderr)
        return []
    given = {key: value for key, value in vars(args).items() if key not in ("case", "out", "megabits")}
    rows: list[Row] = []
    free: dict[str, float] = {}
    for megabits in tqdm([None, *args.megabits], desc="links", unit="rate"):
        for name, measured in zip(args.contenders, launch(given, megabits), strict=True):
            seconds = Spread.of([second for second, _ in measured])
            free.setdefault(name, seconds.median)
            rows.append(
                {
                    "megabits": megabits,
                    "kib": args.kib,
                    "contender": name,
                    "units": seconds.scaled(1 / args.micro_batches / args.unit),
                    "lost": round(1 - free[name] / seconds.median, 4),
                }
            )
    return rows


def draw(rows: list[Row], path: Any) -> None:
    """Throughput lost at each rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5.6, 3.4))
    for name in dict.fromkeys(row["contender"] for row in rows):
        shown = [row for row in rows if row["contender"] == name and row["megabits"] is not None]
        panel.plot([row["megabits"] for row in shown], [100 * row["lost"] for row in shown], "o-", label=name)
    panel.set(xscale="log", xlabel="Mb/s", ylabel="throughput lost (%)")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    found = worker(json.loads(sys.argv[1]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(found))
