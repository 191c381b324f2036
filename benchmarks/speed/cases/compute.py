"""Real compute: tokens a second of a Llama of about ten million parameters, one thread a process.

Two stages by default, because two cores can be busy at once. Text is what scripts/prepare_data.py wrote, or random
tokens without it (the work is the same).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.speed.contenders import Batch, Contender, make
from benchmarks.speed.harness import Row, Spread, interleaved, meet, spawn
from benchmarks.speed.language import llama

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}}


def batches(folder: Path | None, vocabulary: int, size: int, tokens: int) -> Iterator[Batch]:
    """Micro-batches of inputs and next tokens, a few of them for ever."""
    if folder is None:
        ids = torch.randint(vocabulary, (8, size, tokens + 1), generator=torch.Generator().manual_seed(0))
        return cycle([(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in ids])
    from ibp_deepspeed.data import MicroBatchLoader, open_tokens

    loader = MicroBatchLoader(open_tokens(folder, "train", verify=False), tokens, size, document_masks=False)
    return cycle([(inputs, labels) for inputs, labels, _ in islice(loader, 8)])


def tokens_per_second(contender: Contender, data: Iterator[Batch], measured: int, tokens: int) -> float:
    """Of the whole pipeline, after one batch."""
    import torch.distributed as dist

    contender.train_batch(data)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(measured):
        contender.train_batch(data)
    elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return measured * tokens / elapsed.item()


def worker(arguments: dict[str, Any]) -> list[list[float]]:
    """One rank: all contenders of one M, interleaved."""

    torch.set_num_threads(1)
    meet()
    stages, count, size, length = (arguments[key] for key in ("stages", "micro_batches", "batch", "tokens"))
    model = llama(arguments["layers"], arguments["width"], arguments["vocabulary"], settings=ADAM, mode="window")
    data = batches(arguments["data"], arguments["vocabulary"], size, length)
    jobs = []
    for name in arguments["contenders"]:
        contender = make(name, model, stages, count, size)
        measured = max(2, arguments["measured"] // count)
        jobs.append(partial(tokens_per_second, contender, data, measured, count * size * length))
    return interleaved(jobs, arguments["repeats"])


COLUMNS: dict[str, Callable[[Row], str]] = {
    "K": lambda row: str(row["stages"]),
    "M": lambda row: str(row["micro_batches"]),
    "": lambda row: row["contender"],
    "tokens/s": lambda row: "{:,.0f} ({:,.0f} … {:,.0f})".format(*row["tokens_per_second"]),
    "against 1F1B": lambda row: f"{row['speedup']:.2f}×",
    "its price in work": lambda row: row["work"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's options."""
    parser.add_argument("--stages", type=int, default=2, help="K, pipeline stages")
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", default=[1, 2, 4, 8], help="M, micro-batches of a batch"
    )
    names = ["N=1", "B-W", "B-W fused", "1F1B"]
    parser.add_argument("--contenders", nargs="+", default=names, help="1F1B among them; widths in mode window")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--width", type=int, default=320, help="hidden size")
    parser.add_argument("--vocabulary", type=int, default=2048, help="V, its tokens")
    parser.add_argument("--batch", type=int, default=2, help="sequences a micro-batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="prepared text; without it random tokens")
    parser.add_argument("--measured", type=int, default=8, help="micro-batches a repeat, at least two batches")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved; medians count")


def run(args: argparse.Namespace) -> list[Row]:
    """All M."""
    rows: list[Row] = []
    given = {key: value for key, value in vars(args).items() if key not in ("case", "out", "micro_batches")}
    for count in tqdm(args.micro_batches, desc="compute", unit="M"):
        by_rank = spawn(args.stages, worker, {**given, "micro_batches": count})
        speeds = {name: Spread.of(each) for name, each in zip(args.contenders, by_rank[0], strict=True)}
        for name, speed in speeds.items():
            rows.append(
                {
                    "stages": args.stages,
                    "micro_batches": count,
                    "contender": name,
                    "tokens_per_second": speed.scaled(1, 1),
                    "speedup": round(speed.median / speeds["1F1B"].median, 3),
                    "work": _work(name, args.stages),
                }
            )
    return rows


def _work(name: str, stages: int) -> str:
    from benchmarks.speed.predicted import strategy_of
    from ibp_deepspeed.schedule.predict import predict

    strategy = strategy_of(name, stages)
    return "3.00" if strategy is None else f"{predict(strategy, 4).limit:.2f}"


def draw(rows: list[Row], path: Any) -> None:
    """Tokens a second over M."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5.6, 3.4))
    for name in dict.fromkeys(row["contender"] for row in rows):
        shown = [row for row in rows if row["contender"] == name]
        panel.plot([r["micro_batches"] for r in shown], [r["tokens_per_second"][0] for r in shown], "o-", label=name)
    panel.set(xlabel="micro-batches M", ylabel="tokens/s", ylim=0)
    panel.grid(alpha=0.3)
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
