"""Bytes that each stage of a running engine holds, beside what the planner says: weights, gradients, optimizer, saved.

Weights, gradients and the optimizer's state are the tensors of the process; saved activations are counted with
autograd's hooks in the layers (the planner's chunk of logits is for large vocabularies and left out of both). Real
processes on the CPU, a Llama in fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.speed.cases.memory import watch
from benchmarks.speed.contenders import interlocking
from benchmarks.speed.harness import Row, meet, spawn
from benchmarks.speed.language import cut_llama

if TYPE_CHECKING:
    from ibp_deepspeed.models import CausalLM

PARTS = ("weights", "gradients", "optimizer", "activations")


def made(arguments: dict[str, Any]) -> CausalLM:
    """The model of a rank, cut."""
    return cut_llama(arguments["layers"], arguments["width"], arguments["vocabulary"])


def worker(arguments: dict[str, Any]) -> dict[str, dict[str, float]]:
    """One rank: each contender for some batches."""
    from ibp_deepspeed import InterlockingConfig, initialize
    from ibp_deepspeed.models.build import pipeline_module

    torch.set_num_threads(1)
    meet()
    ids = torch.arange(arguments["tokens"])[None] % arguments["vocabulary"]
    found = {}
    for name in arguments["contenders"]:
        block = interlocking(name, arguments["stages"])
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": arguments["micro_batches"],
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "steps_per_print": None,
            "interlocking": block,
        }
        module = pipeline_module(made(arguments), InterlockingConfig.parse(block), arguments["stages"])
        engine: Any = initialize(model=module, config=config)[0]
        found[name] = _counted(engine, repeat((ids, ids)))
    return found


def _counted(engine: Any, data: Any) -> dict[str, float]:
    """Bytes: tensors after two batches, gradients as the optimizer takes them, what is saved in three further ones."""
    gradients, step = 0, engine.optimizer.step

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal gradients
        gradients = sum(p.grad.nbytes for p in engine.module.parameters() if p.grad is not None)
        return step(*args, **kwargs)

    engine.optimizer.step = counting
    for _ in range(2):
        engine.train_batch(data)
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    counted = {
        "weights": sum(p.nbytes for p in engine.module.parameters()),
        "gradients": gradients,
        "optimizer": sum(value.nbytes for value in states if torch.is_tensor(value) and value.dim()),
    }
    saved = watch(engine)
    for _ in range(3):
        engine.train_batch(data)
    return {**counted, "activations": saved.peak["trunk"]}


def predicted(arguments: dict[str, Any], name: str) -> list[dict[str, float]]:
    """Of each stage, by the planner, of the cut that the engine makes."""
    from ibp_deepspeed import InterlockingConfig
    from ibp_deepspeed.models.workload import workload
    from ibp_deepspeed.planner.hardware import Cluster, Device, Link
    from ibp_deepspeed.planner.memory import LOGITS
    from ibp_deepspeed.planner.plan import Job, outlook

    model, stages, block = made(arguments), arguments["stages"], interlocking(name, arguments["stages"])
    config = InterlockingConfig.parse(block)
    size = {"samples": 1, "sequence_length": arguments["tokens"], "weight_bytes": 4}
    bounds = model.partition(stages, aux_heads=config.aux_head, exits=config.exits_for(stages))
    link = Link(1.0, 0.0)
    cluster = Cluster(Device("cpu", 1.0, None, "not used"), link, link)
    job = Job(workload(model, config.aux_head, **size), bounds, arguments["micro_batches"], 1, cluster)
    exits = config.exits_for(stages)
    return [
        {
            "weights": of.weights,
            "gradients": of.gradients,
            "optimizer": of.optimizer,
            "activations": of.activations - (LOGITS if stage in exits else 0),
        }
        for stage, of in enumerate(outlook(job, block).memory)
    ]


COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda row: row["contender"],
    "stage": lambda row: str(row["stage"]),
    **{
        f"{part}, MiB: held, planned": lambda row, part=part: (  # type: ignore[misc]
            f"{row['held'][part] / 2**20:.3f}, {row['planned'][part] / 2**20:.3f}"
        )
        for part in PARTS
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's options."""
    parser.add_argument("--stages", type=int, default=4, help="K, pipeline stages")
    parser.add_argument("--micro-batches", type=int, default=8, help="M, micro-batches of a batch")
    parser.add_argument("--contenders", nargs="+", default=["N=1", "N=2", "G=2", "B-W", "B-W fused"], help="of ours")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--width", type=int, default=64, help="hidden size")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a micro-batch")
    parser.add_argument("--vocabulary", type=int, default=512, help="V, its tokens")


def run(args: argparse.Namespace) -> list[Row]:
    """A row for each contender and stage."""
    names = ("stages", "micro_batches", "contenders", "layers", "width", "tokens", "vocabulary")
    arguments = {name: getattr(args, name) for name in names}
    by_rank = spawn(args.stages, worker, arguments)
    return [
        {"contender": name, "stage": stage, "held": by_rank[stage][name], "planned": planned}
        for name in args.contenders
        for stage, planned in enumerate(predicted(arguments, name))
    ]


def summary(rows: list[Row]) -> str:
    """The largest deviation of each part."""
    said = []
    for part in PARTS:
        most = max((row["held"][part] / row["planned"][part] - 1 for row in rows), key=abs)
        said.append(f"{part} {most:+.1%}")
    return f"Largest deviation of what is held from what is planned: {', '.join(said)}."


def draw(rows: list[Row], path: Any) -> None:
    """Held and planned activations over stages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6.4, 3.4))
    for number, name in enumerate(dict.fromkeys(row["contender"] for row in rows)):
        shown = [row for row in rows if row["contender"] == name]
        for what, style in (("held", "o-"), ("planned", "x--")):
            places, heights = [row["stage"] for row in shown], [row[what]["activations"] / 2**20 for row in shown]
            panel.plot(places, heights, style, color=f"C{number}", label=f"{name}, {what}")
    panel.set(xlabel="stage", ylabel="saved activations (MiB)", ylim=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
