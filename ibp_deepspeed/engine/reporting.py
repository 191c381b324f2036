"""Reports of a stage every ``steps_per_print`` batches: measured here, gathered on rank 0, written to monitors."""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger, safe_get_full_grad
from torch import Tensor, nn

from ibp_deepspeed import measures
from ibp_deepspeed.comm.report_board import ReportBoard
from ibp_deepspeed.stage.meters import Agreement, StageMeters

if TYPE_CHECKING:
    from ibp_deepspeed.engine.engine import InterlockedPipelineEngine
    from ibp_deepspeed.stage.micro_batch import MicroBatchInFlight

_GIB = 2**30
_KEPT = 1000  # reports that nobody has taken


class Reporting:
    """What an engine says of its training.

    Between two reports a stage only counts and reads clocks. At a report the first replica of each stage hands its
    values to a background thread, and rank 0 reads them when all are there: nobody waits.

    Args:
        engine: whose.
        meters: of its stage.
    """

    def __init__(self, engine: InterlockedPipelineEngine, meters: StageMeters) -> None:
        self._engine, self._meters = engine, meters
        self._board = ReportBoard.of_engine(engine.num_stages)
        self._reports: deque[measures.Report] = deque(maxlen=_KEPT)
        self._at_the_step: dict[str, Tensor | float] = {}
        self._agreement: Agreement | None = None
        self._beside: dict[str, list[Tensor]] = {}

    @property
    def is_due(self) -> bool:
        """Whether the batch that is being trained ends with a report."""
        return _is_due(self._engine.global_steps + 1, self._engine.steps_per_print())

    def batch_begins(self) -> None:
        """Decide whether own and received gradients are compared in this batch."""
        due = _is_due(self._engine.global_steps + 1, self._engine.interlocking.cosine_interval)
        self._agreement = Agreement(self._engine.device) if due else None
        self._beside = {}

    def measured(self, name: str, value: Tensor) -> None:
        """A loss of a micro-batch beside that of the exit, a scalar."""
        if self.is_due:
            self._beside.setdefault(name, []).append(value.detach())

    def before_update(self, micro: MicroBatchInFlight, weights: Mapping[int, float]) -> None:
        """All gradients of the stage's output are there, whose ``weights`` are those of the trunk's gradient."""
        if self._agreement is not None:
            self._agreement.add(micro.output_gradients, self._engine.stage_id, weights)

    def before_step(self) -> None:
        """Gradients are summed, averaged over replicas and not yet clipped; all replicas take part."""
        if self._agreement is not None:
            self._at_the_step[measures.COSINE] = self._cosine(self._agreement)
        if not self.is_due:
            return
        self._at_the_step |= {name: self._mean(torch.stack(values).mean()) for name, values in self._beside.items()}
        if self._engine.late_bytes:
            self._at_the_step[measures.LATE_BYTES] = float(self._engine.late_bytes)
        module = self._engine.module
        self._at_the_step[measures.TRUNK_NORM] = _norm(module.trunk_parameters())
        if module.aux_head is not None:
            self._at_the_step[measures.HEAD_NORM] = _norm(p for p in module.aux_head.parameters() if p.requires_grad)
        self._at_the_step[measures.LEARNING_RATE] = self._engine.get_lr()[0]

    def batch_ends(self, seconds: float, losses: Mapping[int, Tensor]) -> None:
        """A batch took so long and has these losses, by their index; the engine has counted it already."""
        self._meters.batch_ends(seconds)
        step = self._engine.global_steps
        if _is_due(step, self._engine.steps_per_print()):
            values = {**self._at_the_step, **self._meters.take(), **memory()}
            self._at_the_step = {}
            if self._engine.grid.get_data_parallel_rank() == 0:
                self._board.publish(step, self._engine.stage_id, values, losses)
            if self._engine.global_rank == 0:
                self._board.expect(step)
        if self._engine.global_rank == 0:
            self._collect()

    def take(self, patience: float = 0.0) -> list[measures.Report]:
        """On rank 0: the reports that are complete and were not taken yet; elsewhere none.

        Args:
            patience: seconds to wait for stages that have trained as far and not reported yet.
        """
        self._collect(patience)
        taken = list(self._reports)
        self._reports.clear()
        return taken

    def close(self) -> None:
        """End the background thread."""
        self._board.close()

    def _collect(self, patience: float = 0.0) -> None:
        """Take what has come to the log and the monitors."""
        for report in self._board.take(patience):
            self._reports.append(report)
            losses = [(k, row[measures.LOSS]) for k, row in enumerate(report.stages) if measures.LOSS in row]
            text = ", ".join(f"stage {k} {loss:.4f}" for k, loss in losses)
            logger.info(f"batch {report.step}: losses of the exits: {text}")
            if self._engine.monitor.enabled:
                events = measures.events(*report)
                copies = {"the LM head": self._engine.refresh_bytes, "layers": self._engine.layer_bytes}
                for what, size in copies.items():
                    if size:
                        events.append((f"Train/copy of {what} (bytes)", size, report.step))
                self._engine.monitor.write_events(events)

    def _mean(self, value: Tensor) -> Tensor:
        """Over the replicas of the stage."""
        grid = self._engine.grid
        if grid.get_data_parallel_world_size() > 1:
            dist.all_reduce(value, group=grid.get_data_parallel_group())
        return value / grid.get_data_parallel_world_size()

    def _cosine(self, agreement: Agreement) -> Tensor:
        grid = self._engine.grid
        if grid.get_data_parallel_world_size() > 1:
            dist.all_reduce(agreement.sums(), group=grid.get_data_parallel_group())
        return agreement.cosine()


def _is_due(step: int, interval: int | None) -> bool:
    return bool(interval) and step % (interval or 1) == 0


def _norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Of the gradients that the optimizer has, wherever DeepSpeed keeps them (0 without any)."""
    gradients = [safe_get_full_grad(parameter) for parameter in parameters]
    return torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])


def memory() -> dict[str, float]:
    """Of tensors on the accelerator, or of this process where the accelerator is the CPU: now, and at most so far."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        now, most = psutil.Process().memory_info().rss, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        most = max(now, most)  # the two are counted at different times
    else:
        now, most = accelerator.memory_allocated(), accelerator.max_memory_allocated()
    return {measures.MEMORY: now / _GIB, measures.PEAK_MEMORY: most / _GIB}
