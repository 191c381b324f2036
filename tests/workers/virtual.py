"""Train the same stages with the engine and, in every process, as virtual ones; exchange checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from ibp_deepspeed import initialize
from ibp_deepspeed.single_process.virtual_pipeline import VirtualPipeline
from tests.toys import loss_fn, make_module, make_reference, micro_batches
from tests.workers.parity import compare, stage_parameters

STAGES, COUNT = 3, 2


def stages_of(case: dict[str, Any]) -> int:
    count: int = case.get("stages", STAGES)
    return count


def settings(case: dict[str, Any], micro_batches: int = COUNT) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {"stage": case.get("zero", 0)},
        "bf16": {"enabled": case.get("bf16", False)},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 3, "total_num_steps": 8}},
        "interlocking": case["interlocking"],
        **case.get("settings", {}),
    }


def make_engine(case: dict[str, Any]) -> Any:
    module = make_module(stages_of(case), case["interlocking"], follow=case.get("follow", False))
    return initialize(model=module, config=settings(case))[0]


def make_virtual(case: dict[str, Any]) -> VirtualPipeline:
    """All replicas' micro-batches are those of the one that it is."""
    parts = make_reference(stages_of(case), {"strategy": "local"}, follow=case.get("follow", False))
    stages, replicas = cast(list[nn.Sequential], parts.stages), dist.get_world_size() // stages_of(case)
    return VirtualPipeline(stages, list(parts.aux_heads.values()), loss_fn, settings(case, COUNT * replicas))


def difference(virtual: VirtualPipeline, engine: Any) -> float:
    return compare(list(engine.module.parameters()), stage_parameters(virtual.reference, engine.stage_id))


def run_case(case: dict[str, Any]) -> dict[str, float]:
    engine, virtual, folder = make_engine(case), make_virtual(case), Path(case["folder"])
    worst: dict[str, float] = {"loss": 0.0}
    rank, replicas = engine.data_parallel_rank, engine.grid.data_parallel_size
    for step in range(5):
        rows = micro_batches(step, COUNT * replicas)
        loss, losses = engine.train_batch(iter(rows[rank::replicas])), virtual.train_batch(iter(rows))
        if engine.module.losses:
            expected = losses[engine.module.losses[-1]].item()
            worst["loss"] = max(worst["loss"], abs(loss.item() - expected) / abs(expected))
    worst["trained"] = difference(virtual, engine)
    if case.get("bf16"):
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        masters = [safe_get_full_fp32_param(parameter).view_as(parameter) for parameter in trained]
        worst["fused"] = all(g.get("fused") for g in engine.basic_optimizer.param_groups if "betas" in g)
        worst["masters"] = compare(masters, virtual.reference.masters(engine.stage_id))
    if case.get("exchange"):
        worst |= exchange(case, engine, virtual, folder)
    engine.close()
    dist.barrier()
    return worst


def exchange(case: dict[str, Any], engine: Any, virtual: VirtualPipeline, folder: Path) -> dict[str, float]:
    """Each loads the other's checkpoint into a new object; all four go on alike."""
    engine.save_checkpoint(str(folder / "engine"), tag="five")
    if dist.get_rank() == 0:
        virtual.save_checkpoint(folder / "virtual", tag="five")
    dist.barrier()
    loaded_virtual = make_virtual(case)
    loaded_virtual.load_checkpoint(folder / "engine")
    loaded_engine = make_engine(case)
    loaded_engine.load_checkpoint(str(folder / "virtual"))
    for step in range(5, 8):
        for trained in (engine, virtual, loaded_engine, loaded_virtual):
            trained.train_batch(iter(micro_batches(step, COUNT)))
    assert loaded_engine.global_steps == loaded_virtual.global_steps == 8
    result = {
        "virtual from engine": difference(loaded_virtual, engine),
        "engine from virtual": difference(virtual, loaded_engine),
    }
    loaded_engine.close()
    return result
