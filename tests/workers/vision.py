"""Train a small image classifier with the engine and with the reference, and compare parameters, buffers, exits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibp_deepspeed import InterlockedReference, InterlockingConfig, initialize
from ibp_deepspeed.models.build import pipeline_module, stage_objective
from ibp_deepspeed.objectives.classification import LossAndAccuracy
from tests.models.vision.small import classifier, images

SAMPLES = 4
RATE: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Largest differences of this stage, of losses and of the exits' evaluation."""
    stages, count = case["stages"], case["micro_batches"]
    case["interlocking"]["decay"] = "all"  # as torch's optimizer, which the reference is given
    replicas = dist.get_world_size() // stages
    engine, reference = make_engine(case, stages, count), make_reference(case, stages)
    rank = engine.grid.get_data_parallel_rank()
    optimizers = [torch.optim.SGD(reference.parameters(k), **RATE) for k in range(stages)]
    losses = 0.0
    for step in range(case.get("steps", 3)):
        rows = micro_batches(step, count, replicas)
        loss = engine.train_batch(iter(rows[rank]))
        want = reference.accumulate([pair for column in zip(*rows, strict=True) for pair in column])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if engine.module.objectives:
            losses = max(losses, abs(loss.item() - want[list(engine.module.objectives)[-1]].item()))
    report = {"loss": losses, "recomputations": engine.recomputations, **compare(engine, reference, replicas)}
    held_out = micro_batches(99, 2, replicas)
    found = engine.eval_batch(iter(held_out[rank]), 2, LossAndAccuracy())
    for module in (*reference.stages, *reference.aux_heads.values()):
        module.eval()
    expected = reference.evaluate([pair for row in held_out for pair in row], LossAndAccuracy())
    assert found.shape == expected.shape == (stages, 2) and torch.equal(found.isnan(), expected.isnan())
    report["eval"] = (found - expected).abs().nan_to_num().max().item() if replicas == 1 else 0.0
    engine.close()
    return report


def make_engine(case: dict[str, Any], stages: int, count: int) -> Any:
    ds_config = {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_accumulation_steps": count,
        "optimizer": {"type": "SGD", "params": RATE},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "pipeline": {"activation_checkpoint_interval": int(case.get("checkpoint", False))},
        "interlocking": case["interlocking"],
    }
    config = InterlockingConfig.parse(case["interlocking"])
    module = pipeline_module(classifier(case["kind"]), config, stages)
    return initialize(model=module, config=ds_config)[0]


def make_reference(case: dict[str, Any], stages: int) -> InterlockedReference:
    model, config = classifier(case["kind"]), InterlockingConfig.parse(case["interlocking"])
    exits = config.exits_for(stages)
    bounds = model.partition(stages, aux_heads=config.aux_head, exits=exits)
    trunks = [nn.Sequential(*map(model.build_layer, range(low, high))) for low, high in pairwise(bounds)]
    heads = [stage_objective(model, config, bounds, k) if k in exits else None for k in range(stages - 1)]
    return InterlockedReference(trunks, heads, model.loss_fn(None), config)


def micro_batches(step: int, count: int, replicas: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Of each replica."""
    return [[images(SAMPLES, 1000 * step + 10 * m + r) for m in range(count)] for r in range(replicas)]


def compare(engine: Any, reference: InterlockedReference, replicas: int) -> dict[str, float]:
    """Of parameters and of buffers; a replica's own buffers are of its part of the data."""
    modules = reference.modules(engine.stage_id)
    report = {"parameter": worst(engine.module.parameters(), [p for m in modules for p in m.parameters()])}
    buffers = list(engine.module.buffers())
    report["buffers"] = len(buffers)
    if replicas == 1:
        report["buffer"] = worst(buffers, [b for m in modules for b in m.buffers()])
        return report
    engine._statistics.average(engine.grid.get_data_parallel_group())
    flat = torch.cat([b.double().flatten() for b in buffers])
    both = [torch.empty_like(flat) for _ in range(replicas)]
    dist.all_gather(both, flat, group=engine.grid.get_data_parallel_group())
    report["buffer"] = (both[0] - both[1]).abs().max().item()
    return report


def worst(got: Any, want: Any) -> float:
    """Largest relative error of a tensor, by norm; of a bias before a batch norm, whose gradient is 0 but for rounding,
    the error itself in thousandths."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(got, want, strict=True)]
    return max((float((a - b).norm() / b.norm().clamp(min=1e-3)) for a, b in pairs), default=0.0)
