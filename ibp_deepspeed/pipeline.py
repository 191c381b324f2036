"""What scripts ask of a pipeline, whether its stages are processes or live in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from ibp_deepspeed.measures import Report


class Pipeline(Protocol):
    """:class:`InterlockedPipelineEngine` and :class:`VirtualPipeline` are one. Losses are in the order of the exits."""

    global_rank: int
    monitor: Any
    """DeepSpeed's, or None."""

    @property
    def global_steps(self) -> int:
        """Batches trained."""

    @property
    def data_parallel_rank(self) -> int:
        """Whose part of the data this process reads."""

    @property
    def refresh_bytes(self) -> int:
        """Bytes of one copy of the last stage's LM head that travels to the heads; 0 if none does."""

    @property
    def layer_bytes(self) -> int:
        """Bytes of one copy of a stage's first layers that travels to the head before them; 0 if none does."""

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """torch's, of the stages in this process."""

    @property
    def schedulers(self) -> Sequence[Any]:
        """Of their learning rates; none, or None for each, without a schedule."""

    @property
    def load_report(self) -> list[str]:
        """What the last :meth:`load_checkpoint` had to change, for the user."""

    def gradient_accumulation_steps(self) -> int:
        """M."""

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples a micro-batch."""

    def train_batch_size(self) -> int:
        """Samples a batch, of all replicas."""

    def train_batch(self, data_iter: Iterator[Any]) -> Tensor:
        """Train on the next M micro-batches (inputs, labels[, sample ids])."""

    def eval_batch(
        self,
        data_iter: Iterator[Any],
        num_micro_batches: int,
        measure: Callable[[Any, Any], Tensor] | None = None,
    ) -> Tensor:
        """Held-out losses of the K exits, on every rank, [K]; or what ``measure(outputs, labels)`` gives, [m] of each
        exit: [K, m]. float64."""

    def latest_losses(self) -> tuple[Tensor, int] | None:
        """On rank 0: the newest complete set of all K training losses, and its batch (from 1)."""

    def losses_after(self, batch: int) -> list[tuple[Tensor, int]]:
        """On rank 0: all K training losses of each batch after that one, as far as they are known, and its number."""

    def new_reports(self, patience: float = 0.0) -> list[Report]:
        """On rank 0: what all stages measured, every ``steps_per_print`` batches, since this was called last."""

    def save_checkpoint(self, save_dir: str | Path, *, files: Mapping[str, str]) -> None:
        """Write a checkpoint, and texts into it by file name."""

    def load_checkpoint(self, load_dir: str | Path, tag: str) -> Any:
        """Resume from a checkpoint."""

    def close(self) -> None:
        """End what runs in the background."""
