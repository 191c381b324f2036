"""Stages whose heads have slow copies of the next stage's first layers: as the reference, late, stopped, refused."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibp_deepspeed import InterlockedPipelineModule, InterlockedReference, initialize
from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.objectives.head import Objective
from ibp_deepspeed.objectives.momentum import Momentum
from ibp_deepspeed.objectives.slow_layers import SlowLayers
from ibp_deepspeed.optimizer.parameter_groups import PLACEHOLDER
from ibp_deepspeed.single_process.virtual_pipeline import VirtualPipeline
from tests.toys import WIDTH, Head, Layer, layer_specs, loss_fn, micro_batches
from tests.workers.parity import OPTIMIZERS, clip_reference, compare, reference_optimizer, stage_parameters
from tests.workers.readouts import said, sleeping

STAGES = 3
Make = Callable[[int], nn.Module | Objective]


class Ahead(nn.Module):
    """A linear readout behind slow copies, which are other layers until they are made equal."""

    def __init__(self, stage: int, layers: int = 1) -> None:
        super().__init__()
        self.slow = SlowLayers([Layer(500 + 10 * stage + i) for i in range(layers)], WIDTH)
        self.readout = Head(100 + stage)

    def forward(self, hidden: Tensor) -> Tensor:
        outputs: Tensor = self.readout(self.slow(hidden.to(self.slow.correction.weight.dtype)))
        return outputs


def ahead(case: dict[str, Any]) -> Make:
    layers = case["interlocking"]["aux_head"]["objective"].get("layers", 1)
    return lambda stage: Momentum(Ahead(stage, layers))


def bounds_of(case: dict[str, Any]) -> list[int]:
    bounds: list[int] = case.get("bounds") or list(range(0, 2 * case.get("stages", STAGES) + 1, 2))
    return bounds


def module_of(case: dict[str, Any], make: Make | None = None) -> InterlockedPipelineModule:
    bounds = bounds_of(case)
    module = InterlockedPipelineModule(
        layer_specs(bounds[-1] // 2, torch.float32),
        num_stages=len(bounds) - 1,
        loss_fn=loss_fn,
        aux_head=make or ahead(case),
        partition_method=bounds,
    )
    for index in case.get("frozen", ()):
        if bounds[module.stage_id] <= index < bounds[module.stage_id + 1]:
            module.forward_funcs[index - bounds[module.stage_id]].requires_grad_(False)
    return module


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    stages, count = len(bounds_of(case)) - 1, case.get("micro_batches", 2)
    replicas = case.get("replicas", dist.get_world_size() // stages)
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": count,
        "steps_per_print": 4,
        "train_batch_size": 4 * count * replicas,
        "optimizer": OPTIMIZERS[case.get("optimizer", "sgd")],
        "gradient_clipping": case.get("clip", 0.0),
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.get("zero", 0)},
        "bf16": {"enabled": case.get("bf16", False)},
        "interlocking": case["interlocking"],
    }


def engine_of(case: dict[str, Any], make: Make | None = None) -> Any:
    return initialize(model=module_of(case, make), config=config_of(case))[0]


def trunks_of(case: dict[str, Any]) -> list[nn.Sequential]:
    bounds = bounds_of(case)
    layers = [spec.build() for spec in layer_specs(bounds[-1] // 2, torch.float32)]
    for index in case.get("frozen", ()):
        layers[index].requires_grad_(False)
    return [nn.Sequential(*layers[low:high]) for low, high in zip(bounds, bounds[1:], strict=False)]


def heads_of(case: dict[str, Any]) -> list[Any]:
    return [ahead(case)(stage) for stage in range(len(bounds_of(case)) - 2)]


def virtual_of(case: dict[str, Any]) -> VirtualPipeline:
    return VirtualPipeline(trunks_of(case), heads_of(case), loss_fn, config_of({**case, "replicas": 1}))


def train(engine: Any, steps: range, count: int = 2) -> list[Tensor]:
    for step in steps:
        engine.train_batch(iter(micro_batches(step, count)))
    return [p.detach().clone() for p in engine.module.parameters()]


def parity(case: dict[str, Any]) -> dict[str, Any]:
    """Relative errors of losses, of all parameters with the copies, and of an evaluation."""
    engine, count = engine_of(case), case.get("micro_batches", 2)
    events: list[Any] = []
    engine.monitor = SimpleNamespace(enabled=True, write_events=events.extend)
    replicas, rank = engine.grid.data_parallel_size, engine.data_parallel_rank
    reference = InterlockedReference(trunks_of(case), heads_of(case), loss_fn, case["interlocking"])
    stages, used = len(reference.stages), 0
    optimizers = [reference_optimizer(case, own) for k in range(stages) if (own := reference.parameters(k))]
    loss_error = 0.0
    for step in range(case.get("steps", 9)):
        rows = [micro_batches(step, count, rank=r) for r in range(replicas)]
        before = [p.clone() for p in engine.module.parameters() if not p.requires_grad]
        loss = engine.train_batch(iter(rows[rank]))
        after = [p for p in engine.module.parameters() if not p.requires_grad]
        used += not all(map(torch.equal, before, after))
        losses = reference.accumulate([pair for column in zip(*rows, strict=True) for pair in column])
        clip_reference(case, reference, stages)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        expected = losses[engine.stage_id].item()
        if engine.module.objectives:
            loss_error = max(loss_error, abs(loss.item() - expected) / expected)
    rows = [micro_batches(99, count, rank=r) for r in range(replicas)]
    found = engine.eval_batch(iter(rows[rank]), count)
    wanted = reference.evaluate([pair for row in rows for pair in row])
    own = [p for name, p in engine.module.named_parameters() if name != PLACEHOLDER]
    engine.new_reports(patience=20.0)
    reported = {value for name, value, _ in events if name == "Train/copy of layers (bytes)"}
    engine.close()
    return {
        "loss": loss_error,
        "parameter": compare(own, stage_parameters(reference, engine.stage_id)),
        "eval": ((found - wanted).abs() / wanted).nan_to_num().max().item(),
        "used": used,
        "bytes": engine.layer_bytes,
        "reported": [int(value) for value in reported],
    }


def late(case: dict[str, Any]) -> list[bool]:
    """Whether slow stages, and slow messages, leave the numbers as they are."""
    results = []
    for slow in (None, 1, 2, "messages"):
        engine = engine_of(case)
        if slow == engine.stage_id:
            engine.module.forward_funcs[0].register_forward_hook(lambda *_: time.sleep(0.03))
        elif slow == "messages":
            for end in (engine._slow_layers._followed, engine._slow_layers._head):
                if end is not None:
                    end.relay._pass_on = sleeping(end.relay._pass_on)
        results.append(train(engine, range(10)))
        engine.close()
    return [all(map(torch.equal, results[0], other)) for other in results[1:]]


def resume(case: dict[str, Any]) -> dict[str, Any]:
    """Save after six batches; go on in another engine, and in the same one after it has gone further."""
    case = {**case, "optimizer": "adamw"}
    engine, folder = engine_of(case), case["folder"]
    train(engine, range(6))
    engine.save_checkpoint(folder, tag="middle")
    paths = sorted(Path(folder, "middle").glob("slow_layers*"))
    state = torch.load(paths[0])
    want = train(engine, range(6, 15))
    other = engine_of(case)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.zero_()
    other.load_checkpoint(folder, tag="middle")
    engine.load_checkpoint(folder, tag="middle")
    report = [*other.load_report, *engine.load_report]
    same = [all(map(torch.equal, want, train(e, range(6, 15)))) for e in (other, engine)]
    dist.barrier()
    if dist.get_rank() == 0:
        for path in paths:
            os.remove(path)
        os.remove(paths[0].with_name(layout.MANIFEST))  # which would name the files first
    dist.barrier()
    refusal = said(lambda: other.load_checkpoint(folder, tag="middle"))
    for each in (engine, other):
        each.close()
    return {
        "files": [path.name for path in paths],
        "pending": sorted(state["taken"]),
        "dtypes": sorted({str(t.dtype) for t in state["average"]}),
        "report": report,
        "same": same,
        "refusal": refusal,
    }


def exchange(case: dict[str, Any]) -> dict[str, float]:
    """Each loads the other's checkpoint into a new object; all four go on alike."""
    case = {**case, "optimizer": "adamw"}
    engine, virtual, folder = engine_of(case), virtual_of(case), Path(case["folder"])
    for step in range(6):
        for each in (engine, virtual):
            each.train_batch(iter(micro_batches(step, 2)))
    engine.save_checkpoint(str(folder / "engine"), tag="six")
    if dist.get_rank() == 0:
        virtual.save_checkpoint(folder / "virtual", tag="six")
    dist.barrier()
    loaded_virtual, loaded_engine = virtual_of(case), engine_of(case)
    loaded_virtual.load_checkpoint(folder / "engine")
    loaded_engine.load_checkpoint(str(folder / "virtual"))
    for step in range(6, 13):
        for each in (engine, virtual, loaded_virtual, loaded_engine):
            each.train_batch(iter(micro_batches(step, 2)))
    found = {
        name: compare(list(e.module.parameters()), stage_parameters(v.reference, e.stage_id))
        for name, (v, e) in {
            "trained": (virtual, engine),
            "virtual from engine": (loaded_virtual, engine),
            "engine from virtual": (virtual, loaded_engine),
        }.items()
    }
    for each in (engine, loaded_engine):
        each.close()
    return found


def reshape(case: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of three stages, in an engine and a virtual pipeline with other bounds: they go on alike."""
    engine, folder = engine_of(case), Path(case["folder"])
    train(engine, range(6))
    engine.save_checkpoint(str(folder), tag="six")
    moved = {**case, "bounds": case["to"]}
    other, virtual = engine_of(moved), virtual_of(moved)
    other.load_checkpoint(str(folder))
    virtual.load_checkpoint(folder)
    lines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lines, [line for line in other.load_report if "copies" in line])
    head, stage = cast(Any, other.module.aux_head), other.stage_id
    layer = cast(Any, virtual.reference.stages[(stage + 1) % STAGES])[0]
    begins = head is not None and torch.equal(head.slow.layers[0].weight, layer.weight)
    for step in range(6, 13):
        for each in (other, virtual):
            each.train_batch(iter(micro_batches(step, 2)))
    error = compare(list(other.module.parameters()), stage_parameters(virtual.reference, stage))
    for each in (engine, other):
        each.close()
    said_virtual = [line for line in virtual.load_report if "copies" in line]
    return {"lines": [sum(lines, []), said_virtual], "begins": begins, "error": error}


def average(case: dict[str, Any]) -> list[bool]:
    """Whether a bf16 head has the rounded average of the layers so far, in every batch (R = 1, delay = 0)."""
    engine = engine_of({**case, "optimizer": "adamw", "bf16": True})
    beta, exact, same = case["interlocking"]["aux_head"]["objective"]["average"], torch.empty(0), []
    for step in range(10):
        weight = engine.module.forward_funcs[0].weight.detach().float()
        dist.broadcast(weight, 1)
        exact = torch.lerp(exact, weight, 1 - beta) if step else weight
        train(engine, range(step, step + 1))
        same.append(engine.stage_id != 0 or torch.equal(engine.module.aux_head.slow.layers[0].weight, exact.bfloat16()))
    engine.close()
    return same


class Plain(Momentum):
    """One whose module has no copies."""


def trained(stage: int) -> Objective:
    head = Ahead(stage)
    head.slow.layers.requires_grad_(True)
    return Momentum(head)


def refusals(case: dict[str, Any]) -> list[str]:
    """What this rank says of heads and stages that don't fit."""
    three = {"interlocking": {"strategy": "local", "aux_head": {"objective": {"name": "momentum", "layers": 3}}}}
    attempts: list[Callable[[], Any]] = [
        lambda: engine_of(case, lambda stage: Plain(Head(stage))),
        lambda: engine_of(case, trained),
        lambda: engine_of(case, lambda stage: Momentum(Ahead(stage, 2))),
        lambda: VirtualPipeline(trunks_of(case), [Head(0), Head(1)], loss_fn, config_of(case)),
        lambda: engine_of(three),
        lambda: virtual_of(three),
    ]
    return [said(attempt) for attempt in attempts]


_TASKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "parity": parity,
    "late": late,
    "resume": resume,
    "exchange": exchange,
    "reshape": reshape,
    "average": average,
    "refusals": refusals,
}


def run_case(case: dict[str, Any]) -> Any:
    return _TASKS[case["task"]](case)
