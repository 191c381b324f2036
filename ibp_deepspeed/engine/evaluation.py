"""An evaluation of all exits by the processes of a pipeline, micro-batch by micro-batch, without running ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ibp_deepspeed.comm.message import TensorSpec
from ibp_deepspeed.comm.stage_links import EvaluationLink
from ibp_deepspeed.documents import reading
from ibp_deepspeed.objectives.evaluation import weight_of
from ibp_deepspeed.stage.losses import StageLosses
from ibp_deepspeed.stage.sample_ledger import SampleLedger

if TYPE_CHECKING:
    from ibp_deepspeed.engine.engine import InterlockedPipelineEngine

_NO_BATCH = -1  # in the place of a batch's number in the headers of messages


Measure = Callable[[Any, Any], Tensor]


def evaluate(engine: InterlockedPipelineEngine, micro_batches: int, measure: Measure | None = None) -> Tensor:
    """The K held-out losses, or what ``measure`` gives, on the engine's data, on every rank. Shape [K] or [K, m],
    float64. See ``engine.eval_batch``."""
    losses, ledger = StageLosses(engine.grid, engine.device), SampleLedger(engine.stage_id)
    link = engine.links.evaluation_link()
    try:
        for m in range(micro_batches):
            engine.position.at(f"the evaluation of micro-batch {m}")
            _evaluate_micro_batch(engine, m, link, losses, ledger, measure)
    finally:
        link.close()
    means = losses.means(engine.module.losses)
    numbers = 1 if measure is None else _most_numbers(engine, means)
    found = torch.zeros(engine.num_stages, numbers, dtype=torch.float64, device=engine.device)
    for index, mean in means.items():
        found[index] = mean
    dist.all_reduce(found, group=engine.grid.get_pipe_parallel_group())
    ledger.check()
    return found.cpu() if numbers > 1 else found[:, 0].cpu()


def _most_numbers(engine: InterlockedPipelineEngine, means: Mapping[int, Tensor]) -> int:
    """What a measure gives for a micro-batch; a stage that measures nothing learns it from the others."""
    numbers = torch.tensor(max((mean.numel() for mean in means.values()), default=0), device=engine.device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX, group=engine.grid.get_pipe_parallel_group())
    return int(numbers)


def _evaluate_micro_batch(
    engine: InterlockedPipelineEngine,
    micro_batch: int,
    link: EvaluationLink,
    losses: StageLosses,
    ledger: SampleLedger,
    measure: Measure | None,
) -> None:
    module, stage = engine.module, engine.stage_id
    inputs, labels, key, documents = engine.load_micro_batch()
    if stage > 0:
        inputs, header = link.receive()
        ledger.add(header, _NO_BATCH, micro_batch, key)
    borrowed = module.placement.borrowed_from(stage)
    with reading(documents):
        read = module.borrowed_layers(inputs) if borrowed else None
        outputs = module.remaining_layers(read) if borrowed else module.trunk(inputs)
        if stage < engine.num_stages - 1:
            link.send(TensorSpec.of(outputs, stage), outputs, (_NO_BATCH, micro_batch, key))
        for loss, objective in module.objectives.items():
            made = objective.outputs(outputs if loss == stage else read)
            if measure is None:
                losses.add(loss, objective.measure(made, labels), objective.weight(labels))
            else:
                losses.add(loss, measure(made, labels), weight_of(measure, labels))
