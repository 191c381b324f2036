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

from benchmarks.speed.contenders import Batch, applies, make
from benchmarks.speed.emulated import Timed, model, time_batches
from benchmarks.speed.harness import Row, Spread, add_timing_arguments, interleaved, meet
from benchmarks.speed.namespaces import hosts, missing
from benchmarks.speed.sleeping import WIDTH

_SECONDS = 900


def data(kib: int) -> Iterator[Batch]:
    """Hidden states of that size, for ever the same."""
    states = torch.zeros(1, kib * 1024 // 4 // WIDTH, WIDTH)
    return repeat((states, states))


def worker(arguments: dict[str, Any]) -> list[list[Timed]]:
    """One stage: all contenders, interleaved."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    meet()
    stages, count, unit = (arguments[key] for key in ("stages", "micro_batches", "unit"))
    batches = max(2, arguments["measured"] // count)
    jobs = []
    for name in arguments["contenders"]:
        engine = make(name, model(stages, unit), stages, count)
        jobs.append(partial(time_batches, engine, batches, rows=data(arguments["kib"])))
    measured = interleaved(jobs, arguments["repeats"])
    dist.barrier()
    return measured


def launch(arguments: dict[str, Any], megabits: float | None) -> list[list[Timed]]:
    """All stages on their hosts; what the first one measured."""
    together, stages = arguments["stages_a_host"], arguments["stages"]
    with hosts(stages // together, megabits) as made, tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "WORLD_SIZE": str(stages),
            "MASTER_ADDR": made[0].address,
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": made[0].interface,
        }
        result = Path(folder) / "result.json"
        words = [sys.executable, "-m", "benchmarks.speed.cases.links", json.dumps(arguments), str(result)]
        processes = [
            subprocess.Popen(
                made[rank // together].command(*words),
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank % together)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(stages)
        ]
        try:
            said = [process.communicate(timeout=_SECONDS)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        failed = next((rank for rank, process in enumerate(processes) if process.returncode), None)
        if failed is not None:
            raise RuntimeError(f"stage {failed} ended with code {processes[failed].returncode}:\n{said[failed]}")
        return [[Timed(*batch) for batch in row] for row in json.loads(result.read_text())]


def _mib(row: Row) -> str:
    return f"{row['kib'] / 1024:g}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "K": lambda row: str(row["stages"]),
    "stages a host": lambda row: str(row["stages_a_host"]),
    "Mb/s": lambda row: "no limit" if row["megabits"] is None else f"{row['megabits']:g}",
    "MiB a message": _mib,
    "": lambda row: row["contender"],
    "units a micro-batch": lambda row: "{:.2f} ({:.2f} … {:.2f})".format(*row["units"]),
    "throughput lost": lambda row: f"{row['lost']:.1%}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's options."""
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 8], help="K, pipeline stages")
    parser.add_argument(
        "--stages-a-host",
        type=int,
        nargs="+",
        default=[1, 4],
        help="for each K: stages of a host, joined by fast links",
    )
    parser.add_argument("--micro-batches", type=int, default=8, help="M, micro-batches of a batch")
    parser.add_argument(
        "--megabits", type=float, nargs="+", default=[1000, 200, 50], help="10^6 bits a second of the links"
    )
    parser.add_argument("--kib", type=int, default=416, help="KiB of a hidden state")
    names = ["N=1", "N=2", "N=2 slack 1", "N=2 slack 2", "G=4", "B-W", "1F1B"]
    parser.add_argument("--contenders", nargs="+", default=names, help="1F1B among them; slack: hop_slack")
    add_timing_arguments(parser, unit=0.05, measured=16)


def run(args: argparse.Namespace) -> list[Row]:
    """All rates, without a limit first."""
    reason = missing()
    if reason is not None:
        print(f"slow links are not measured: {reason}.", file=sys.stderr)
        return []
    rows: list[Row] = []
    layouts = list(zip(args.stages, args.stages_a_host, strict=True))
    bar = tqdm(total=len(layouts) * (1 + len(args.megabits)), desc="links", unit="rate")
    for stages, together in layouts:
        rows += _layout(args, stages, together, bar)
    return rows


def _layout(args: argparse.Namespace, stages: int, together: int, bar: Any) -> list[Row]:
    """All rates for so many stages, so many of them on a host."""
    contenders = [name for name in args.contenders if applies(name, stages, args.micro_batches)]
    own = {"stages": stages, "stages_a_host": together, "contenders": contenders}
    given = {**{key: value for key, value in vars(args).items() if key not in ("case", "out", "megabits")}, **own}
    rows: list[Row] = []
    free: dict[str, float] = {}
    for megabits in (None, *args.megabits):
        for name, measured in zip(contenders, launch(given, megabits), strict=True):
            seconds = Spread.of([batch.seconds for batch in measured])
            free.setdefault(name, seconds.median)
            rows.append(
                {
                    "stages": stages,
                    "stages_a_host": together,
                    "megabits": megabits,
                    "kib": args.kib,
                    "contender": name,
                    "units": seconds.scaled(1 / args.micro_batches / args.unit),
                    "lost": round(1 - free[name] / seconds.median, 4),
                }
            )
        bar.update(1)
    return rows


def draw(rows: list[Row], path: Any) -> None:
    """Throughput lost at each rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layouts = sorted({(row["stages"], row["stages_a_host"]) for row in rows})
    figure, panels = plt.subplots(1, len(layouts), figsize=(4.8 * len(layouts), 3.4), squeeze=False)
    for panel, layout in zip(panels[0], layouts, strict=True):
        limited = [r for r in rows if (r["stages"], r["stages_a_host"]) == layout and r["megabits"] is not None]
        for name in dict.fromkeys(row["contender"] for row in limited):
            shown = [row for row in limited if row["contender"] == name]
            panel.plot([row["megabits"] for row in shown], [100 * row["lost"] for row in shown], "o-", label=name)
        title = f"K = {layout[0]}, {layout[1]} a host"
        panel.set(xscale="log", xlabel="Mb/s", ylabel="throughput lost (%)", title=title)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    found = worker(json.loads(sys.argv[1]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(found))
