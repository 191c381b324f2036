"""Train and save on one shape, load on another: what is kept, where heads come from, how the training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from ibp_deepspeed import InterlockedPipelineModule, initialize
from ibp_deepspeed.checkpoint.reader import names_of
from tests.toys import Head, Layer, loss_fn, micro_batches

LAYERS = 8
SAMPLES = 8  # micro-batches of all replicas together


class HeadWithSources(Head):
    """A head that can start as the model's last layer."""

    def sources(self) -> dict[str, str]:
        return {"weight": f"{LAYERS - 1}.weight", "bias": f"{LAYERS - 1}.bias"}


def make_engine(case: dict[str, Any]) -> Any:
    bounds, replicas = case["bounds"], case.get("replicas", 1)
    dtype = torch.bfloat16 if case.get("bf16") else torch.float32
    specs = [LayerSpec(Layer, seed, dtype) for seed in range(LAYERS - 1)] + [LayerSpec(Head, LAYERS - 1, dtype)]
    heads = case["interlocking"]["strategy"] != "global" or case["interlocking"].get("mode") == "sum"
    kind = HeadWithSources if case.get("sources") else Head
    module = InterlockedPipelineModule(
        specs,
        num_stages=len(bounds) - 1,
        loss_fn=loss_fn,
        aux_head=(lambda stage: kind(100 + stage, dtype)) if heads else None,
        interlocking=case["interlocking"],
        partition_method=bounds,
    )
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": SAMPLES // replicas,
        "zero_optimization": {"stage": case.get("zero", 0)},
        "bf16": {"enabled": bool(case.get("bf16"))},
        "gradient_clipping": 0.0,
        "optimizer": {
            "type": "Muon" if case.get("muon") else "AdamW",
            "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True},
        },
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.02}},
    }
    return initialize(model=module, config=config)[0]


def run_case(case: dict[str, Any]) -> dict[str, Any] | None:
    """A case that loads says how; one that saves has nothing to say."""
    if "load" in case:
        return load(case)
    save(case)
    return None


def train(engine: Any, batches: range) -> None:
    """The same samples in every batch, whatever the replicas."""
    rank, replicas = engine.grid.get_data_parallel_rank(), engine.grid.data_parallel_size
    for batch in batches:
        engine.train_batch(iter(micro_batches(batch, SAMPLES)[rank::replicas]))


def states(engine: Any) -> dict[str, dict[str, Tensor]]:
    """Of this stage: name in the model → weight, fp32 copy and moments."""
    names = names_of(engine.module, engine.module.head_boundary)
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # else only after a step
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found, muons = {}, set(map(id, engine.module.inner_matrices() if engine.optimizer_name() == "muon" else ()))
    for name, parameter in engine.module.named_parameters():
        found[names[name]] = values = {"weight": parameter.detach().clone()}
        for key in ("momentum_buffer",) if id(parameter) in muons else ("exp_avg", "exp_avg_sq"):
            if hasattr(parameter, "_hp_mapping"):
                values[key] = safe_get_full_optimizer_state(parameter, key)
                values["master"] = safe_get_full_fp32_param(parameter)
            else:
                values[key] = engine.optimizer.state[parameter][key].clone()
    return found


def together(engine: Any) -> dict[str, dict[str, Tensor]]:
    """The states of all stages."""
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, states(engine))
    return {name: values for row in rows for name, values in row.items()}


def save(case: dict[str, Any]) -> None:
    """Three batches, a checkpoint, three more; the states of both moments go beside it."""
    engine, folder = make_engine(case), Path(case["save"])
    train(engine, range(3))
    for group in groups_of(engine) if case.get("own_settings") else []:
        group["eps"] = 1e-8 * (1 + 2 * engine.stage_id // engine.num_stages)  # the second half's is twice as large
    engine.save_checkpoint(folder, client_state={"mine": "kept"})
    moments = [together(engine)]
    rate, samples = engine.get_lr()[0], engine.global_samples
    train(engine, range(3, 6))
    moments.append(together(engine))
    if dist.get_rank() == 0:
        torch.save({"moments": moments, "rate": rate, "samples": samples}, folder / "states.pt")
    engine.close()


def load(case: dict[str, Any]) -> dict[str, Any]:
    """Load on this shape and go on: what is as it was saved, and how far the end is from the other's."""
    folder = Path(case["load"])
    there = torch.load(folder / "states.pt", weights_only=False)
    engine = make_engine(case)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.fill_(0.5)  # what is not loaded shows
    if "options" in case:
        return load_a_part(engine, folder, case["options"], there["moments"][0])
    _, client_state = engine.load_checkpoint(folder)
    kept, moved = compare(there["moments"][0], together(engine))
    lines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lines, engine.load_report)
    decays = [group["weight_decay"] for group in groups_of(engine)]
    eps: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(eps, [group.get("eps") for group in groups_of(engine)])
    counted = [engine.global_steps, engine.global_samples - there["samples"], engine.get_lr()[0] - there["rate"]]
    train(engine, range(3, 6))
    end = together(engine)
    errors = {
        name: ((end[name]["weight"] - value["weight"]).norm() / value["weight"].norm()).item()
        for name, value in there["moments"][1].items()
        if name in end
    }
    if "again" in case:
        engine.save_checkpoint(case["again"])
    engine.close()
    return {
        "kept": kept,
        "moved": moved,
        "client": client_state["mine"],
        "lines": sorted(line for row in lines for line in row),
        "counted": counted,
        "error": max(errors.values()),
        "decays": decays,
        "eps": eps,
    }


def load_a_part(
    engine: Any, folder: Path, options: dict[str, bool], saved: dict[str, dict[str, Tensor]]
) -> dict[str, Any]:
    """With DeepSpeed's options: what came, and whether the training goes on."""
    places = names_of(engine.module, engine.module.head_boundary)
    there = [(p, saved[places[n]]["weight"]) for n, p in engine.module.named_parameters() if places[n] in saved]
    assert there and not any(torch.equal(*pair) for pair in there)
    torch.rand(1)  # elsewhere than when the checkpoint was written
    random = torch.random.get_rng_state()
    engine.load_checkpoint(folder, **options)
    states = getattr(engine.optimizer, "optimizer", engine.optimizer).state.values()
    moments = any("exp_avg" in state and bool(state["exp_avg"].any()) for state in states)
    found = {
        "weights": all(torch.equal(*pair) for pair in there),
        "moments": moments,
        "schedule": engine.lr_scheduler.last_batch_iteration,
        "steps": engine.global_steps,
        "random": not torch.equal(random, torch.random.get_rng_state()),
    }
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    train(engine, range(3, 6))
    steps = [(a - b).norm() / a.norm() for a, b in zip(before, engine.module.parameters(), strict=True)]
    engine.close()
    return {**found, "step": max(steps).item()}


def groups_of(engine: Any) -> list[dict[str, Any]]:
    """Of torch's optimizer, which DeepSpeed's may be around."""
    groups: list[dict[str, Any]] = getattr(engine.optimizer, "optimizer", engine.optimizer).param_groups
    return groups


def compare(
    saved: dict[str, dict[str, Tensor]], loaded: dict[str, dict[str, Tensor]]
) -> tuple[list[str], dict[str, str]]:
    """Names whose every value is the saved one, and for the others the name that they equal."""
    kept, moved = [], {}
    for name, values in loaded.items():
        if name in saved and same(values, saved[name]):
            kept.append(name)
        else:
            moved[name] = next((other for other, there in saved.items() if same(values, there)), "nothing")
    return sorted(kept), moved


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    keys = one.keys() & other.keys()
    return (
        "weight" in keys
        and keys & {"exp_avg", "momentum_buffer"} != set()
        and all(one[key].shape == other[key].shape and torch.equal(one[key], other[key]) for key in keys)
    )
