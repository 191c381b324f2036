"""Stages that learn from the next exit some batches later: as the reference, slow messages, a stop and a new start."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibp_deepspeed import (
    InterlockedPipelineModule,
    InterlockedReference,
    InterlockingConfig,
    InterlockingError,
    initialize,
)
from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.measures import LATE_BYTES, LATE_LOSS
from ibp_deepspeed.models.build import pipeline_module, stage_objective, virtual_pipeline
from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.objectives.head import Objective
from ibp_deepspeed.objectives.late_targets import LateTargets
from ibp_deepspeed.optimizer.parameter_groups import PLACEHOLDER
from tests.models.test_causal_lm import SEQUENCE, shifted, tiny
from tests.toys import Head, layer_specs, loss_fn, micro_batches
from tests.workers.parity import OPTIMIZERS, compare, stage_parameters
from tests.workers.readouts import sleeping

ROWS = 4


def settings(case: dict[str, Any], replicas: int = 1) -> dict[str, Any]:
    count = case.get("count", 2)
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": count,
        "train_batch_size": ROWS * count * replicas,
        "optimizer": OPTIMIZERS[case.get("optimizer", "sgd")],
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.get("zero", 0)},
        "bf16": {"enabled": case.get("bf16", False)},
        "steps_per_print": 2,
        "interlocking": case["interlocking"],
    }


def cut(case: dict[str, Any]) -> CausalLM:
    dtype = torch.bfloat16 if case.get("bf16") else torch.float32
    # weights so large that the exits don't all say the same at first
    return CausalLM(tiny("llama", num_hidden_layers=case["stages"], initializer_range=0.2), dtype=dtype)


def engine_of(case: dict[str, Any]) -> Any:
    replicas = dist.get_world_size() // case["stages"]
    if case.get("own"):
        module = own_module(case)
    else:
        module = pipeline_module(cut(case), InterlockingConfig.parse(case["interlocking"]), case["stages"])
    return initialize(model=module, config=settings(case, replicas))[0]


def reference_of(case: dict[str, Any], module: Any) -> InterlockedReference:
    config, stages, bounds = InterlockingConfig.parse(case["interlocking"]), case["stages"], module.parts
    if case.get("own"):
        layers = [spec.build() for spec in layer_specs(stages, torch.float32)]
        heads: list[Any] = [Towards(Head(100 + k), late=Outputs(tokens=3)) for k in range(stages - 1)]
    else:
        model = cut({**case, "bf16": False})
        layers = [model.build_layer(i) for i in range(bounds[-1])]
        heads = [stage_objective(model, config, bounds, k) for k in range(stages - 1)]
    trunks = [nn.Sequential(*layers[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    return InterlockedReference(trunks, heads, module.loss_fn, config)


@dataclass(frozen=True)
class Outputs(LateTargets):
    """All that the next exit says."""

    def of(self, outputs: Tensor, labels: Tensor) -> list[Tensor]:
        return [outputs]


class Towards(Objective):
    """An objective of a user's own: towards the next exit's outputs, and labels."""

    def late_loss(self, states: Tensor, labels: Tensor, targets: list[Tensor]) -> Tensor:
        return (self.module(states) - targets[0] + 0.1 * labels).square().mean()


def own_module(case: dict[str, Any]) -> InterlockedPipelineModule:
    stages = case["stages"]
    return InterlockedPipelineModule(
        layer_specs(stages, torch.float32),
        num_stages=stages,
        loss_fn=loss_fn,
        aux_head=lambda stage: Towards(Head(100 + stage), late=Outputs(tokens=3)),
        partition_method=list(range(0, 2 * stages + 1, 2)),
    )


def data(case: dict[str, Any], step: int, count: int, replica: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of a replica; of the language model some labels don't count."""
    if case.get("own"):
        return micro_batches(step, count, rank=replica)
    generator, rows = torch.Generator().manual_seed(100 * step + replica), []
    for _ in range(count):
        input_ids = torch.randint(3, 97, (ROWS, SEQUENCE), generator=generator)
        labels = shifted(input_ids)
        labels[0, : SEQUENCE // 2] = -100
        rows.append((input_ids, labels))
    return rows


def train(engine: Any, case: dict[str, Any], steps: range) -> list[Tensor]:
    for step in steps:
        engine.train_batch(iter(data(case, step, engine.micro_batches, engine.data_parallel_rank)))
    return [p.detach().clone() for p in engine.module.parameters()]


def parity(case: dict[str, Any]) -> dict[str, Any]:
    """Largest relative errors of losses and parameters, and the largest of late losses.

    ``resize``: the number of micro-batches after five batches.
    """
    stages, count = case["stages"], case.get("count", 2)
    replicas = dist.get_world_size() // stages
    engine = engine_of(case)
    reference = reference_of(case, engine.module)
    parameters = [p for k in range(stages) for p in reference.parameters(k)]
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    worst = {"loss": 0.0, "late": 0.0, "parameter": 0.0}
    means: list[dict[int, dict[str, float]]] = []
    for step in range(case.get("steps", 9 if "resize" in case else 7)):
        if step == 5 and "resize" in case:
            count = case["resize"]
            engine.set_train_batch_size(ROWS * count * replicas)
        rows = [data(case, step, count, replica) for replica in range(replicas)]
        loss = engine.train_batch(iter(rows[engine.data_parallel_rank]))
        losses = reference.accumulate([pair for column in zip(*rows, strict=True) for pair in column])
        means.append(reference.side_means)
        if engine.module.losses and engine.module.objectives:
            expected = losses[engine.module.losses[-1]].item()
            worst["loss"] = max(worst["loss"], abs(loss.item() - expected) / expected)
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
    own = [p for name, p in engine.module.named_parameters() if name != PLACEHOLDER]
    worst["parameter"] = compare(own, stage_parameters(reference, engine.stage_id))
    told = 0
    for report in engine.new_reports(patience=20.0):  # on rank 0
        for k, row in enumerate(report.stages):
            if LATE_LOSS in row:
                expected = means[report.step - 1][k][LATE_LOSS]
                worst["late"] = max(worst["late"], abs(row[LATE_LOSS] - expected))
                told += 1
    result = {**worst, "told": told, "bytes": engine.late_bytes, "delay": delay_of(engine)}
    dist.barrier()
    engine.close()
    return result


def delay_of(engine: Any) -> int | None:
    memory = None if engine._answers is None else engine._answers._memory
    return None if memory is None else memory.way.delay


def slow(case: dict[str, Any]) -> dict[str, Any]:
    """Whether a slow last stage, and slow messages, leave the numbers as they are; and the reports of bytes."""
    results, told = [], []
    for what in (None, "stage", "messages"):
        engine = engine_of(case)
        if what == "stage" and engine.is_last_stage():
            engine.module.forward_funcs[0].register_forward_hook(lambda *_: time.sleep(0.03))
        elif what == "messages" and engine._answers._sink is not None:
            engine._answers._sink._pass_on = sleeping(engine._answers._sink._pass_on)
        results.append(train(engine, case, range(8)))
        told.append([[row.get(LATE_BYTES) for row in r.stages] for r in engine.new_reports(patience=20.0)])
        dist.barrier()
        engine.close()
    return {"same": [all(map(torch.equal, results[0], other)) for other in results[1:]], "told": told[0]}


def resume(case: dict[str, Any]) -> dict[str, Any]:
    """Save after five batches; go on in another engine, in the same one after it has gone further, and in one whose
    number of micro-batches is another."""
    engine, folder = engine_of(case), case["folder"]
    train(engine, case, range(5))
    engine.save_checkpoint(folder, tag="middle")
    saved = sorted(path.name for path in Path(folder, "middle").glob(layout.ANY_LATE_TARGETS))
    want = train(engine, case, range(5, 11))
    other = engine_of(case)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.zero_()
    said = []
    for each in (other, engine):
        each.load_checkpoint(folder, tag="middle")
        said += each.load_report
    same = [all(map(torch.equal, want, train(each, case, range(5, 11)))) for each in (other, engine)]
    reshaped = engine_of({**case, "count": 3})
    reshaped.load_checkpoint(folder, tag="middle")
    lines = [line for line in reshaped.load_report if "late" in line]
    train(reshaped, case, range(5, 9))
    for each in (engine, other, reshaped):
        each.close()
    return {"saved": saved, "same": same, "said": said, "reshaped": lines}


def exchange(case: dict[str, Any]) -> dict[str, Any]:
    """Engine and virtual pipeline load each other's checkpoint, and all go on alike; a virtual one as itself."""
    folder = Path(case["folder"])
    engine, virtual = engine_of(case), virtual_of(case)
    train(engine, case, range(5))
    learn(virtual, case, range(5))
    engine.save_checkpoint(str(folder / "engine"), tag="five")
    if dist.get_rank() == 0:
        virtual.save_checkpoint(folder / "virtual", tag="five")
    dist.barrier()
    loaded, other, again = virtual_of(case), engine_of(case), virtual_of(case)
    loaded.load_checkpoint(folder / "engine")
    other.load_checkpoint(str(folder / "virtual"))
    again.load_checkpoint(folder / "virtual")
    for each in (virtual, loaded, again):
        learn(each, case, range(5, 10))
    for each in (engine, other):
        train(each, case, range(5, 10))
    stage = engine.stage_id
    found = {
        "together": compare(list(engine.module.parameters()), stage_parameters(virtual.reference, stage)),
        "from engine": compare(list(engine.module.parameters()), stage_parameters(loaded.reference, stage)),
        "from virtual": compare(list(other.module.parameters()), stage_parameters(virtual.reference, stage)),
        "again": compare(stage_parameters(again.reference, stage), stage_parameters(virtual.reference, stage)),
        "said": [*loaded.load_report, *other.load_report, *again.load_report],
    }
    for each in (engine, other):
        each.close()
    return found


def virtual_of(case: dict[str, Any]) -> Any:
    return virtual_pipeline(cut(case), settings(case), case["stages"])


def learn(virtual: Any, case: dict[str, Any], steps: range) -> None:
    for step in steps:
        virtual.train_batch(iter(data(case, step, virtual.gradient_accumulation_steps())))


def refusal(case: dict[str, Any]) -> str:
    """What this rank says of a user's own objective that wants late targets behind borrowed layers."""
    try:
        engine_of(case)
    except InterlockingError as error:
        return str(error)
    return "nothing"


_TASKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "parity": parity,
    "slow": slow,
    "resume": resume,
    "exchange": exchange,
    "refusal": refusal,
}


def run_case(case: dict[str, Any]) -> Any:
    return _TASKS[case["task"]](case)
