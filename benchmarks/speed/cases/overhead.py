"""Stages that do next to nothing: what an engine itself costs for each micro-batch.

``bare`` is a loop that sends and receives the same tensors with torch.distributed and computes the same losses and
gradients: whatever an engine takes beyond it is its own. CPU time is that of the training thread; with fewer cores
than stages the wall-clock time also holds the waiting for a core.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.speed.contenders import Batch, Contender, Model, make
from benchmarks.speed.harness import Row, Spread, interleaved, meet, spawn
from benchmarks.speed.sleeping import WIDTH, loss_fn


class Scale(nn.Module):
    """Almost no work."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.weight


MODEL = Model(layers=[], head=Scale, loss_fn=loss_fn)


class Bare:
    """What every pipeline does at least, micro-batch by micro-batch: forward, send, losses, gradients; no engine.

    Args:
        stages: K; this process is the stage of its rank.
        micro_batches: M.
        name: of the contender whose work this is: ``N=1``, ``N=2``, ``N=K`` (with heads) or ``1F1B`` (without).
    """

    def __init__(self, stages: int, micro_batches: int, name: str) -> None:
        import torch.distributed as dist

        self.stage, self.last, self.count = dist.get_rank(), stages - 1, micro_batches
        self.heads, self.gradients, self.pairwise = name != "1F1B", name != "N=1", name == "N=2" and stages > 2
        self.trunk, self.head = nn.Sequential(Scale(), Scale()), Scale()
        parameters = [*self.trunk.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.0)

    def train_batch(self, data_iter: Iterator[Batch]) -> None:
        """Train on the next M micro-batches."""
        for inputs, labels in islice(data_iter, self.count):
            self._micro_batch(inputs, labels)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _micro_batch(self, inputs: Tensor, labels: Tensor) -> None:
        import torch.distributed as dist

        if self.stage:
            inputs = torch.empty_like(inputs)
            dist.recv(inputs, self.stage - 1)
            inputs.requires_grad_(self.gradients)
        hidden = self.trunk(inputs)
        if self.stage == self.last:
            self._loss(hidden, labels).backward()
        else:
            dist.send(hidden.detach(), self.stage + 1)
            gradient = self._head(hidden, labels) if self.heads else None
            if self.pairwise and self.stage:
                (upstream,) = torch.autograd.grad(hidden, inputs, gradient, retain_graph=True)
                dist.send(upstream, self.stage - 1)
            if self.gradients:
                gradient = torch.empty_like(hidden)
                dist.recv(gradient, self.stage + 1)
            torch.autograd.backward(hidden, gradient)
        if self.stage and self.gradients and not (self.pairwise and self.stage < self.last):
            assert inputs.grad is not None
            dist.send(inputs.grad, self.stage - 1)

    def _head(self, hidden: Tensor, labels: Tensor) -> Tensor | None:
        states = hidden.detach().requires_grad_(self.pairwise or not self.gradients)
        self._loss(self.head(states), labels).backward()
        return states.grad

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return loss_fn(outputs, labels) / self.count


def timed_instructions(engine: Any) -> dict[str, list[float]]:
    """Have every instruction of an engine record the CPU time of its thread; by name, in seconds."""
    times: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, execute: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            result = execute(self, *args, **kwargs)
            times[name].append(time.thread_time() - start)
            return result

        return run

    engine._INSTRUCTION_MAP = {kind: timed(kind.__name__, execute) for kind, execute in engine._INSTRUCTION_MAP.items()}
    return times


def measure_batches(contender: Contender, batches: int, count: int) -> tuple[float, float]:
    """Wall-clock and CPU seconds of this thread a micro-batch."""
    import torch.distributed as dist

    rows = _data()
    dist.barrier()
    for _ in range(3):
        contender.train_batch(rows)
    dist.barrier()
    wall, cpu = time.perf_counter(), time.thread_time()
    for _ in range(batches):
        contender.train_batch(rows)
    cpu = time.thread_time() - cpu
    dist.barrier()
    return (time.perf_counter() - wall) / batches / count, cpu / batches / count


def _data() -> Iterator[Batch]:
    while True:
        yield torch.zeros(1, WIDTH), torch.zeros(1, WIDTH)


def worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank: all contenders, interleaved, then one of ours once more with a clock on every instruction."""

    torch.set_num_threads(1)
    meet()
    stages, count = arguments["stages"], arguments["micro_batches"]
    model = Model([Scale] * (2 * stages), MODEL.head, MODEL.loss_fn)
    contenders: dict[str, Contender] = {}
    for name in dict.fromkeys(("N=1", "N=2", f"N={stages}", "1F1B")):
        contenders[f"bare {name}"] = Bare(stages, count, name)
        contenders[name] = make(name, model, stages, count)
    jobs = [partial(measure_batches, contender, arguments["batches"], count) for contender in contenders.values()]
    measured = dict(zip(contenders, interleaved(jobs, arguments["repeats"]), strict=True))
    times = timed_instructions(contenders["N=1"])
    measure_batches(contenders["N=1"], arguments["batches"], count)
    return {"measured": measured, "instructions": {name: Spread.of(row).median for name, row in times.items()}}


COLUMNS: dict[str, Callable[[Row], str]] = {
    "K": lambda row: str(row["stages"]),
    "M": lambda row: str(row["micro_batches"]),
    "": lambda row: row["contender"],
    "ms a micro-batch": lambda row: "{:.2f} ({:.2f} … {:.2f})".format(*row["wall_ms"]),
    "CPU ms a micro-batch and stage": lambda row: "{:.2f} ({:.2f} … {:.2f})".format(*row["cpu_ms"]),
    "beyond bare": lambda row: f"{row['beyond_bare_ms']:+.2f}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's options."""
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4], help="K, pipeline stages")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 8], help="M, micro-batches of a batch")
    parser.add_argument("--batches", type=int, default=50, help="batches that are measured in a repeat")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved; medians count")


def run(args: argparse.Namespace) -> list[Row]:
    """All K and M."""
    rows: list[Row] = []
    for stages, count in tqdm([(k, m) for k in args.stages for m in args.micro_batches], desc="overhead"):
        by_rank = spawn(
            stages,
            worker,
            {"stages": stages, "micro_batches": count, "batches": args.batches, "repeats": args.repeats},
        )
        for name in by_rank[0]["measured"]:
            wall = Spread.of([wall for wall, _ in by_rank[0]["measured"][name]])
            # the mean over the stages, repeat by repeat
            each = zip(*([cpu for _, cpu in rank["measured"][name]] for rank in by_rank), strict=True)
            cpu = Spread.of([sum(stage_times) / stages for stage_times in each])
            rows.append(
                {
                    "stages": stages,
                    "micro_batches": count,
                    "contender": name,
                    "wall_ms": wall.scaled(1e3),
                    "cpu_ms": cpu.scaled(1e3),
                }
            )
            if name == "N=1":
                middle = by_rank[min(1, stages - 1)]["instructions"]
                rows[-1]["instruction_ms"] = {key: round(1e3 * value, 4) for key, value in middle.items()}
        _subtract_bare(rows, stages, count)
    return rows


def _subtract_bare(rows: list[Row], stages: int, count: int) -> None:
    here = {row["contender"]: row for row in rows if (row["stages"], row["micro_batches"]) == (stages, count)}
    for name, row in here.items():
        bare = here[f"bare {name.removeprefix('bare ')}"]
        row["beyond_bare_ms"] = round(row["cpu_ms"][0] - bare["cpu_ms"][0], 3)


def draw(rows: list[Row], path: Any) -> None:
    """CPU time of each instruction at N = 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = next(row for row in rows if "instruction_ms" in row)
    names, values = zip(*sorted(shown["instruction_ms"].items(), key=lambda item: item[1]), strict=True)
    figure, panel = plt.subplots(figsize=(6.4, 3.2))
    panel.barh(names, values)
    panel.set(xlabel=f"CPU ms, N = 1, K = {shown['stages']}, M = {shown['micro_batches']}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
