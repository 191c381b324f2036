"""Tokens a second and MFU of what a pipeline reports, which knows neither tokens nor peaks."""

from __future__ import annotations

from dataclasses import dataclass

from ibp_deepspeed import measures
from ibp_deepspeed.commands.training.report import Machine, mfu
from ibp_deepspeed.measures import Report


@dataclass(frozen=True)
class Throughput:
    """What turns a stage's time of a batch into throughput.

    Attributes:
        tokens_per_batch: of all replicas.
        machine: of rank 0.
        flops_per_token: of the training.
        counted: what is counted: tokens, or images.
        peak: floating-point operations a second of a GPU; None where it is not known, on CPU too.
    """

    tokens_per_batch: int
    machine: Machine
    flops_per_token: float
    peak: float | None
    counted: str = "tokens"

    @property
    def unit(self) -> str:
        """What throughput is divided by."""
        return "GPU" if self.machine.card else "process"

    def of(self, report: Report) -> list[dict[str, float]]:
        """Tokens (or images) a second of all devices and of each, and MFU, as the time of each stage says."""
        return [self._of_stage(stage[measures.BATCH_TIME]) for stage in report.stages]

    def _of_stage(self, seconds: float) -> dict[str, float]:
        total = self.tokens_per_batch / seconds
        each = total / self.machine.units
        found = {measures.throughput(self.counted): total, measures.throughput(self.counted, self.unit): each}
        if self.peak is not None:
            found[measures.MFU] = mfu(each, self.flops_per_token, self.peak)
        return found
