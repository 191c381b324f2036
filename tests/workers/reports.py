"""What an engine reports of its training, beside the same values worked out by plain autograd in one process."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ibp_deepspeed import InterlockedReference, initialize
from ibp_deepspeed.engine.engine import InterlockedPipelineEngine
from ibp_deepspeed.strategy.timeline import Timeline
from tests.toys import loss_fn, make_module, make_reference, micro_batches

COUNT, LIMIT, RATE, STEPS = 3, 0.01, 0.1, 4
SLEEP = 0.05


def settings(case: dict[str, Any], replicas: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": COUNT,
        "train_batch_size": 4 * COUNT * replicas,
        "steps_per_print": 2,
        "gradient_clipping": LIMIT,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.get("zero", 0)},
        "bf16": {"enabled": case.get("bf16", False)},
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "interlocking": {"cosine_interval": 2, **case["interlocking"]},
    }


def run_case(case: dict[str, Any]) -> list[Any]:
    """Reports of rank 0, each with what is expected; ``[]`` on other ranks."""
    stages = case["stages"]
    replicas = dist.get_world_size() // stages
    engine = initialize(model=make_module(stages), config=settings(case, replicas))[0]
    if "slow" in case:
        _slow(engine, case["slow"])
    reference = make_reference(stages, case["interlocking"])
    expected = {}
    for step in range(STEPS):
        rows = [micro_batches(step, COUNT, rank=rank) for rank in range(replicas)]
        engine.train_batch(iter(rows[engine.data_parallel_rank]))
        everything = [pair for column in zip(*rows, strict=True) for pair in column]
        expected[step + 1] = by_hand(reference, everything)
        for k in range(stages):
            parameters = reference.parameters(k)
            torch.nn.utils.clip_grad_norm_(parameters, LIMIT)
            torch.optim.SGD(parameters, lr=RATE).step()
            for parameter in parameters:
                parameter.grad = None
    reports = engine.new_reports(patience=20.0)
    assert engine.new_reports() == [], "each is given once"
    dist.barrier()
    engine.close()
    return [{"step": report.step, "got": report.stages, "want": expected[report.step]} for report in reports]


def by_hand(reference: InterlockedReference, rows: list[tuple[Tensor, Tensor]]) -> list[dict[str, float]]:
    """Losses, norms and cosines of a batch; leaves the gradients in ``.grad``."""
    stages = len(reference.stages)
    graphs = [_outputs(reference, *pair) for pair in rows]
    weights = Timeline(reference.interlocking, stages, len(rows), True).at(reference.batch)[0]
    losses = reference.accumulate(rows)
    found = []
    for k in range(stages):
        modules = reference.modules(k)
        values = {"loss": losses[k].item(), "gradient norm of trunk": _norm(modules[0])}
        if len(modules) > 1:
            values["gradient norm of head"] = _norm(modules[1])
        later = weights.weights(k)
        own, received = [], []
        for hidden, value in graphs:
            if k in value and any(j > k for j in later) and k < stages - 1:
                own.append(_gradient(value[k], hidden[k]))
                terms = [w * _gradient(value[j], hidden[k]) for j, w in later.items() if j > k]
                received.append(torch.stack(terms).sum(0))
        if own:
            one, other = torch.cat(own).flatten().double(), torch.cat(received).flatten().double()
            values["cosine of own and received gradient"] = (one @ other / (one.norm() * other.norm())).item()
        found.append({name: value for name, value in values.items() if math.isfinite(value)})
    return found


def _outputs(reference: InterlockedReference, inputs: Tensor, labels: Tensor) -> tuple[list[Tensor], dict[int, Tensor]]:
    """h_k of all stages, and the losses that there are, on one graph."""
    hidden, losses, current = [], {}, inputs
    for k, stage in enumerate(reference.stages):
        current = stage(current)
        hidden.append(current)
        if k in reference.aux_heads:
            losses[k] = loss_fn(reference.aux_heads[k](current), labels)
    return hidden, {**losses, len(hidden) - 1: loss_fn(current, labels)}


def _gradient(loss: Tensor, hidden: Tensor) -> Tensor:
    return torch.autograd.grad(loss, hidden, retain_graph=True)[0]


def _norm(module: torch.nn.Module) -> float:
    squares = [p.grad.double().square().sum() for p in module.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item()


def _slow(engine: InterlockedPipelineEngine, stage: int) -> None:
    """This stage's forward passes take longer than all else."""
    if engine.stage_id != stage:
        return
    layer = engine.module.forward_funcs[0]
    forward = layer.forward

    def sleeping(hidden: Tensor) -> Any:
        time.sleep(SLEEP)
        return forward(hidden)

    layer.forward = sleeping
