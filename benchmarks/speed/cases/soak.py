"""Thousands of batches that stream, with a pause of random length before each instruction of each rank.

At the end the parameters are those of one process to the last digits, and what could pile up has not: memory of each
process, file handles, threads, messages under way, keys of the job's store. Two layers a stage, whose widths are small.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.speed.harness import Row, meet, spawn

if TYPE_CHECKING:
    from ibp_deepspeed.engine.moment import Hook

WIDTH, SAMPLES = 16, 4
COUNTED = ("memory", "handles", "threads", "under_way", "keys")
_SAMPLES_OF_A_RUN = 200
_LONG = 0.002  # share of the pauses that are ten times as long


def layers(stages: int) -> list[nn.Module]:
    """Two a stage, the same wherever they are made."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2 * stages)]


def head(stage: int) -> nn.Module:
    """The same wherever it is made."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(100 + stage)
        return nn.Linear(WIDTH, WIDTH)


def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
    """A mean of squares."""
    return (outputs - labels).square().mean()


def data(batches: int, micro_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of noise, the same for all."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(batches * micro_batches):
        rows = torch.randn(2, SAMPLES, WIDTH, generator=generator)
        yield rows[0], rows[1]


def settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed configuration; each stage reports every ten batches."""
    return {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_accumulation_steps": arguments["micro_batches"],
        "optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
        "steps_per_print": 10,
        "interlocking": {"strategy": arguments["strategy"]},
    }


def pauses(mean: float, rank: int) -> Hook:
    """A hook that sleeps for a random time, now and then a long one."""
    chance = random.Random(rank)

    def hook(_: object) -> None:
        seconds = chance.expovariate(1 / mean)
        time.sleep(seconds * 10 if chance.random() < _LONG else seconds)

    return hook


def worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank: what was counted on the way, and the parameters at the end."""
    from ibp_deepspeed import InterlockedPipelineModule, initialize

    torch.set_num_threads(1)
    meet()
    stages, batches = arguments["stages"], arguments["batches"]
    module = InterlockedPipelineModule(
        layers(stages), num_stages=stages, loss_fn=loss_fn, aux_head=head, partition_method="uniform"
    )
    engine: Any = initialize(model=module, config=settings(arguments))[0]
    if arguments["pause"]:
        engine.before_instruction = pauses(arguments["pause"], engine.global_rank)
    rows, counted = data(batches, arguments["micro_batches"]), []
    began = time.perf_counter()
    for batch in range(1, batches + 1):
        engine.train_batch(rows)
        engine.new_reports()
        engine.latest_losses()
        if batch % max(1, batches // _SAMPLES_OF_A_RUN) == 0:
            counted.append(count(engine))
    seconds = time.perf_counter() - began
    parameters = [p.tolist() for layer in engine.module.forward_funcs for p in layer.parameters()]
    engine.close()
    return {"counted": counted, "parameters": parameters, "seconds": seconds}


def count(engine: Any) -> dict[str, float]:
    """What this process holds; keys on rank 0 alone, where they are all."""
    process = psutil.Process()
    channels = [channel for channel in (engine.links.down, engine.links.up) if channel is not None]
    store = dist.distributed_c10d._get_default_store()
    return {
        "memory": process.memory_info().rss / 2**20,
        "handles": process.num_fds(),
        "threads": process.num_threads(),
        "under_way": sum(channel._in_flight() for channel in channels),
        "keys": store.num_keys() if engine.global_rank == 0 else 0,
    }


def reference(arguments: dict[str, Any]) -> list[list[Tensor]]:
    """The parameters of each stage, trained in one process."""
    from ibp_deepspeed import VirtualPipeline

    stages = arguments["stages"]
    made = layers(stages)
    trunks = [nn.Sequential(*made[2 * k : 2 * k + 2]) for k in range(stages)]
    pipeline = VirtualPipeline(trunks, [head(k) for k in range(stages - 1)], loss_fn, settings(arguments))
    rows = data(arguments["batches"], arguments["micro_batches"])
    for _ in range(arguments["batches"]):
        pipeline.train_batch(rows)
        pipeline.new_reports()
    return [list(trunk.parameters()) for trunk in trunks]


def quarters(counted: list[dict[str, float]], name: str) -> tuple[float, float]:
    """The median in the second quarter and in the last one."""
    values, size = [row[name] for row in counted], max(1, len(counted) // 4)
    return statistics.median(values[size : 2 * size] or values), statistics.median(values[-size:])


def _both(name: str, form: str) -> Callable[[Row], str]:
    return lambda row: ", ".join(format(value, form) for value in row[name])


COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda row: row["contender"],
    "memory, MiB: 2nd quarter, last": _both("memory", ".1f"),
    "handles": _both("handles", ".0f"),
    "threads": _both("threads", ".0f"),
    "messages under way": _both("under_way", ".0f"),
    "keys of the store": _both("keys", ".0f"),
    "largest difference": lambda row: f"{row['difference']:.1e}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's options."""
    parser.add_argument("--stages", type=int, default=4, help="K")
    parser.add_argument("--micro-batches", type=int, default=4, help="M")
    parser.add_argument("--batches", type=int, default=2000, help="in all")
    parser.add_argument("--strategy", default="pairwise", help="of the interlocking block")
    parser.add_argument("--pause", type=float, default=5e-4, help="mean before an instruction, seconds; 0: none")


def run(args: argparse.Namespace) -> list[Row]:
    """A row for each stage."""
    arguments = {name: getattr(args, name) for name in ("stages", "micro_batches", "batches", "strategy", "pause")}
    ranks = spawn(args.stages, worker, arguments)
    wanted = reference(arguments)
    return [
        {
            "contender": f"stage {stage}",
            "seconds": rank["seconds"],
            **{name: quarters(rank["counted"], name) for name in COUNTED},
            "memories": [round(row["memory"], 2) for row in rank["counted"]],
            "difference": max(
                float((torch.tensor(one) - other.detach()).abs().max())
                for one, other in zip(rank["parameters"], wanted[stage], strict=True)
            ),
        }
        for stage, rank in enumerate(ranks)
    ]


def summary(rows: list[Row]) -> str:
    """What has grown most."""
    growth = max(row["memory"][1] - row["memory"][0] for row in rows)
    return (
        f"{rows[0]['seconds']:.0f} s; memory grew by {growth:.2f} MiB at most, the parameters differ from those of one "
        f"process by {max(row['difference'] for row in rows):.1e} at most."
    )


def draw(rows: list[Row], path: Any) -> None:
    """Memory of each process over the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6.4, 3.4))
    for row in rows:
        share = [(number + 1) / len(row["memories"]) for number in range(len(row["memories"]))]
        panel.plot(share, row["memories"], label=row["contender"])
    panel.set(xlabel="part of the run", ylabel="memory of the process (MiB)", ylim=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
