"""An evaluation of all exits by the processes of a pipeline, micro-batch by micro-batch, without running ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ibp_deepspeed.comm.message import TensorSpec
from ibp_deepspeed.comm.stage_links import EvaluationLink
from ibp_deepspeed.documents import reading
from ibp_deepspeed.stage.losses import StageLosses
from ibp_deepspeed.stage.sample_ledger import SampleLedger

if TYPE_CHECKING:
    from ibp_deepspeed.engine.engine import InterlockedPipelineEngine

_NO_BATCH = -1  # in the place of a batch's number in the headers of messages


def evaluate(engine: InterlockedPipelineEngine, micro_batches: int) -> Tensor:
    """The K held-out losses on the engine's data, on every rank. Shape [K], float64. See ``engine.eval_batch``."""
    losses, ledger = StageLosses(engine.grid, engine.device), SampleLedger(engine.stage_id)
    link = engine.links.evaluation_link()
    try:
        for m in range(micro_batches):
            engine.position.at(f"the evaluation of micro-batch {m}")
            _evaluate_micro_batch(engine, m, link, losses, ledger)
    finally:
        link.close()
    found = torch.zeros(engine.num_stages, dtype=torch.float64, device=engine.device)
    for index, loss in losses.means(engine.module.losses).items():
        found[index] = loss
    dist.all_reduce(found, group=engine.grid.get_pipe_parallel_group())
    ledger.check()
    return found.cpu()


def _evaluate_micro_batch(
    engine: InterlockedPipelineEngine, micro_batch: int, link: EvaluationLink, losses: StageLosses, ledger: SampleLedger
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
            losses.add(loss, objective.measure(made, labels), objective.weight(labels))
