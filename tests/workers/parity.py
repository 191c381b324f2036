"""Train a list of small cases with the engine and with the reference, side by side, in every process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ibp_deepspeed import InterlockedReference, initialize
from ibp_deepspeed.comm.message import Memory
from ibp_deepspeed.optimizer.parameter_groups import PLACEHOLDER
from tests.toys import make_module, make_reference, micro_batches

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.float32}
OPTIMIZERS = {
    "sgd": {"type": "SGD", "params": {"lr": 0.3, "momentum": 0.9}},
    "adamw": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.01, "torch_adam": True}},
}


def run_case(case: dict[str, Any]) -> dict[str, float]:
    stages, count = case["stages"], case["micro_batches"]
    dtype, heads = DTYPES[case.get("dtype", "fp32")], case.get("heads", True)
    replicas = dist.get_world_size() // stages
    engine = make_engine(case, stages, count, dtype, heads, replicas)
    reference = make_reference(stages, case["interlocking"], dtype, heads=heads, follow=follows(case))
    freeze(case, [layer for trunk in reference.stages for layer in trunk.children()], reference.aux_heads)
    rank = engine.grid.get_data_parallel_rank()
    parameters = [p for k in range(stages) for p in reference.parameters(k)]
    optimizers = [reference_optimizer(case, own) for k in range(stages) if (own := reference.parameters(k))]
    worst = {"gradient": 0.0, "parameter": 0.0, "loss": 0.0, "eval": 0.0}
    gradients, messages = record_first_gradients(engine), count_gradient_messages(engine)
    for step in range(case.get("steps", 5)):
        rows = [micro_batches(step, count, dtype, r) for r in range(replicas)]
        loss = engine.train_batch(iter(rows[rank]))
        # All replicas' first micro-batches come first: they are the wide ones where widths are mixed.
        losses = reference.accumulate([pair for column in zip(*rows, strict=True) for pair in column])
        clip_reference(case, reference, stages)
        if (
            step == 0
            and not case.get("zero")
            and case.get("dtype") != "bf16"
            and replicas == 1
            and not case.get("clip")
            and not case.get("frozen")
        ):
            worst["gradient"] = compare(gradients, [p.grad for p in reference.parameters(engine.stage_id)])
        for optimizer in optimizers:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        if engine.module.objectives:
            expected = losses[list(engine.module.objectives)[-1]].item()
            worst["loss"] = max(worst["loss"], abs(loss.item() - expected) / abs(expected))
        if case.get("eval") and step == 2:
            worst["eval"] = compare_evaluation(engine, reference, count, dtype, rank, replicas)
    own = [p for name, p in engine.module.named_parameters() if name != PLACEHOLDER]
    worst["parameter"] = compare(own, stage_parameters(reference, engine.stage_id))
    worst["gradient messages"] = float(len(messages))
    worst["recomputations"] = float(engine.recomputations)
    worst["compiled"] = float(sum(layer._compiled_call_impl is not None for layer in engine.module.forward_funcs))
    engine.close()
    return worst


def freeze(case: dict[str, Any], layers: Sequence[torch.nn.Module], heads: dict[int, torch.nn.Module]) -> None:
    """Layers that are not trained, by their index in the uncut model, and heads by their stage."""
    for index in case.get("frozen", ()):
        layers[index].requires_grad_(False)
    for stage in set(case.get("frozen_heads", ())) & heads.keys():
        heads[stage].requires_grad_(False)


def count_gradient_messages(engine: Any) -> list[Any]:
    """Those that this stage sends from now on."""
    sent: list[Any] = []
    send = engine.links.send_gradient

    def counting(*args: Any) -> None:
        sent.append(args)
        send(*args)

    engine.links.send_gradient = counting
    return sent


def follows(case: dict[str, Any]) -> bool:
    """Whether the heads have a copy of the last readout."""
    return (case["interlocking"].get("aux_head") or {}).get("readout", "private") != "private"


def stage_parameters(reference: InterlockedReference, stage: int) -> list[torch.Tensor]:
    """All of a stage, a head's copy included, in the order of the engine's module."""
    return [p for module in reference.modules(stage) for p in module.parameters()]


def make_engine(case: dict[str, Any], stages: int, count: int, dtype: torch.dtype, heads: bool, replicas: int) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": count,
        "train_batch_size": 4 * count * replicas,
        "optimizer": OPTIMIZERS[case.get("optimizer", "sgd")],
        "gradient_clipping": case.get("clip", 0.0),
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.get("zero", 0)},
        "bf16": {"enabled": case.get("dtype") == "bf16"},
        "pipeline": {"activation_checkpoint_interval": int(case.get("checkpoint", False))},
        "interlocking": case["interlocking"],
    }
    module = make_module(stages, dtype=dtype, heads=heads, follow=follows(case))
    first, head = 2 * module.stage_id, module.placement.head_at(module.stage_id)
    mine = {**case, "frozen": [i - first for i in case.get("frozen", ()) if first <= i < first + 2]}
    freeze(mine, module.forward_funcs, {} if head is None or module.aux_head is None else {head: module.aux_head})
    if not case.get("staged"):
        return initialize(model=module, config=config)[0]
    with mock.patch.object(Memory, "of", lambda device: Memory(device, staged=True)):  # as for a device behind gloo
        return initialize(model=module, config=config)[0]


def reference_optimizer(case: dict[str, Any], parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if case.get("optimizer", "sgd") == "sgd":
        return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    vectors = [p for p in parameters if p.dim() < 2]  # which don't decay
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.01)


def clip_reference(case: dict[str, Any], reference: InterlockedReference, stages: int) -> None:
    """The norm of one stage, or of all of them together."""
    if not case.get("clip"):
        return
    scopes = [reference.parameters(k) for k in range(stages)]
    if case["interlocking"].get("clip_scope") == "global":
        scopes = [[p for scope in scopes for p in scope]]
    for scope in scopes:
        torch.nn.utils.clip_grad_norm_(scope, case["clip"])


def record_first_gradients(engine: Any) -> list[torch.Tensor]:
    """Gradients at the first optimizer step (only where DeepSpeed leaves them in ``.grad``)."""
    gradients: list[torch.Tensor] = []
    step = engine.optimizer.step

    def recording_step(*args: Any, **kwargs: Any) -> Any:
        parameters = [p for p in engine.module.parameters() if p.requires_grad]
        if not gradients and all(p.grad is not None for p in parameters):
            gradients.extend(p.grad.clone() for p in parameters if p.grad is not None)
        return step(*args, **kwargs)

    engine.optimizer.step = recording_step
    return gradients


def compare(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor | None]) -> float:
    """Largest relative error of a tensor, by norm."""
    assert len(got) == len(want) > 0 and all(b is not None for b in want)
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(got, want, strict=True) if b is not None]
    errors = [(a - b).norm() / b.norm() for a, b in pairs]
    return max(float(e) for e in errors)


def compare_evaluation(engine: Any, reference: Any, count: int, dtype: torch.dtype, rank: int, replicas: int) -> float:
    rows = [micro_batches(99, count + 1, dtype, r) for r in range(replicas)]
    got = engine.eval_batch(iter(rows[rank]), num_micro_batches=count + 1)
    want = reference.evaluate([pair for row in rows for pair in row])
    assert got.shape == want.shape and torch.equal(got.isnan(), want.isnan())
    return float(((got - want).abs() / want.abs()).nan_to_num().max())
