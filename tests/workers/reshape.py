"""Train one shape, save, load into another shape, go on; what engines hold is asked of them, not of their files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from ibp_deepspeed import InterlockedPipelineModule, initialize
from ibp_deepspeed.virtual import VirtualPipeline
from tests.launch import report
from tests.toys import FollowingHead, Head, layer_specs, loss_fn, micro_batches
from tests.workers.parity import destroy_groups

LAYERS, MICRO_BATCHES = 8, 4  # of a batch, over all replicas
BOUNDS = {1: [0, 8], 2: [0, 4, 8], 3: [0, 3, 5, 8], 4: [0, 2, 4, 6, 8]}
MOMENTS = ("exp_avg", "exp_avg_sq")
States = dict[str, dict[str, Tensor]]


def settings(case: dict[str, Any], replicas: int = 1) -> dict[str, Any]:
    layout = case.get("layout", "plain")
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": MICRO_BATCHES // replicas,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": int(layout in ("zero", "bf16"))},
        "bf16": {"enabled": layout.startswith("bf16")},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.02}},
        "interlocking": case.get("interlocking", {"strategy": "global"}),
    }


def make_head(case: dict[str, Any], stage: int) -> nn.Module:
    return FollowingHead(100 + stage) if case.get("follow") else Head(100 + stage)


def make_engine(case: dict[str, Any]) -> Any:
    stages = case["stages"]
    module = InterlockedPipelineModule(
        layer_specs(LAYERS // 2, torch.float32),
        num_stages=stages,
        loss_fn=loss_fn,
        aux_head=lambda stage: make_head(case, stage),
        interlocking=case.get("interlocking", {"strategy": "global"}),
        partition_method=BOUNDS[stages],
    )
    return initialize(model=module, config=settings(case, dist.get_world_size() // stages))[0]


def make_virtual(case: dict[str, Any], heads: list[nn.Module] | None = None) -> VirtualPipeline:
    bounds = BOUNDS[case["stages"]]
    layers = [spec.build() for spec in layer_specs(LAYERS // 2, torch.float32)]
    stages = [nn.Sequential(*layers[low:high]) for low, high in zip(bounds, bounds[1:], strict=False)]
    heads = [make_head(case, k) for k in range(len(stages) - 1)] if heads is None else heads
    return VirtualPipeline(cast(list[nn.Sequential], stages), heads or None, loss_fn, settings(case))


def train(trained: Any, steps: range) -> None:
    """The batches of all replicas together are the same in every shape."""
    rank, count = 0, MICRO_BATCHES
    if not isinstance(trained, VirtualPipeline):
        rank, count = trained.grid.get_data_parallel_rank(), trained.gradient_accumulation_steps()
    for step in steps:
        trained.train_batch(iter(micro_batches(step, MICRO_BATCHES)[rank * count : (rank + 1) * count]))


def held(engine: Any) -> States:
    """Weights and moments of all stages by layer, or by the boundary of the head, and by name."""
    module, own = engine.module, {}
    places = {str(index): layer for index, layer in module.named_children() if index.isdecimal()}
    if module.aux_head is not None:
        places[f"head {module.parts[module.stage_id + 1]}"] = module.aux_head
    for place, part in places.items():
        for name, parameter in part.named_parameters():
            if parameter.requires_grad:
                own[f"{place}:{name}"] = state_of(engine, parameter)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {name: state for states in everyone for name, state in states.items()}


def state_of(engine: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        moments = {key: engine.optimizer.state[parameter][key] for key in MOMENTS}
        master, step = parameter.detach(), engine.optimizer.state[parameter]["step"]
    else:
        moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        master, base = safe_get_full_fp32_param(parameter), engine.optimizer.optimizer
        step = base.state[base.param_groups[0]["params"][0]]["step"]
    copies = {key: value.clone() for key, value in moments.items()}
    return copies | {"weight": parameter.detach().clone(), "master": master.clone(), "step": torch.as_tensor(step)}


def same(got: States, want: States, names: list[str] | None = None) -> list[str]:
    """Names of states that differ in any bit."""
    return [
        f"{name} {key}"
        for name in names or got
        for key in got[name]
        if name not in want or not torch.equal(got[name][key], want[name][key])
    ]


def worst(got: States, want: States) -> float:
    """Largest relative error of a master weight, by norm."""
    both = [(got[name]["master"].double(), want[name]["master"].double()) for name in got.keys() & want.keys()]
    assert len(both) >= 2 * LAYERS
    return max(float((a - b).norm() / b.norm()) for a, b in both)


def save_two(case: dict[str, Any]) -> None:
    """A checkpoint after three batches, and what a run without a stop holds then and after six."""
    engine, folder = make_engine(case), Path(case["folder"])
    train(engine, range(3))
    engine.save_checkpoint(folder, client_state={"mine": 5})
    three = held(engine), engine.get_lr()
    train(engine, range(3, 6))
    six = held(engine), engine.get_lr()
    if dist.get_rank() == 0:
        torch.save({"three": three, "six": six}, folder / "held.pt")
    dist.barrier()
    engine.close()


def go_on(case: dict[str, Any]) -> dict[str, Any]:
    """Load three batches of another shape, train three more."""
    engine, truth = make_engine(case), torch.load(Path(case["folder"]) / "held.pt")
    train(engine, range(7, 8))  # nothing of the engine's own may be left
    _, client_state = engine.load_checkpoint(case["folder"])
    loaded, (three, rate) = held(engine), truth["three"]
    result = {
        "report": engine.load_report,
        "differing": same({name: loaded[name] for name in loaded if name in three}, three),
        "heads": {name: same({name: loaded[name]}, {name: three[source]}) for name, source in case.get("heads", [])},
        "unknown": sorted(name for name in loaded if name not in three),
        "rate": engine.get_lr() == rate,
        "numbers": [engine.global_steps, engine.global_samples, client_state["mine"]],
    }
    train(engine, range(3, 6))
    result["six"] = worst(held(engine), truth["six"][0])
    result["rate"] = result["rate"] and engine.get_lr() == truth["six"][1]
    engine.close()
    return result


def as_virtual(case: dict[str, Any]) -> dict[str, Any]:
    """Whether an engine goes on as virtual stages do, from a checkpoint that virtual stages of another shape wrote."""
    engine, virtual = make_engine(case), make_virtual(case)
    for each in (engine, virtual):
        each.load_checkpoint(case["folder"])
        train(each, range(3, 9))
    reference, stage = virtual.reference, engine.stage_id
    want = [p for module in reference.modules(stage) for p in module.parameters()]
    pairs = zip(engine.module.parameters(), want, strict=True)
    errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
    engine.close()
    return {"worst": max(errors), "reports": [list(engine.load_report), list(virtual.load_report)]}


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    deepspeed.utils.logger.setLevel("ERROR")
    torch.set_num_threads(1)
    tasks = {"save": save_two, "go on": go_on, "virtual": as_virtual}
    results = []
    for each in json.loads(sys.argv[1]):
        results.append(tasks[each["task"]](each))  # type: ignore[operator]
        dist.barrier()
        destroy_groups()
    report(results)
