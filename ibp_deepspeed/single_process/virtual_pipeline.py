"""K virtual stages on one device, trained as the engine trains K real ones.

The gradients are the reference's; optimizers, learning-rate schedules, clipping and checkpoints are those that the
DeepSpeed configuration means. For studies of how a strategy learns, where speed-up is of no interest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import logger
from torch import Tensor, nn

from ibp_deepspeed import measures
from ibp_deepspeed.batches import position_ids, to_device, unpack
from ibp_deepspeed.compilation import compile_layers
from ibp_deepspeed.config.deepspeed import check_ds_config, is_enabled, resolve_interlocking
from ibp_deepspeed.documents import Documents
from ibp_deepspeed.errors import BatchError, ConfigError
from ibp_deepspeed.objectives.head import Objective
from ibp_deepspeed.objectives.side_loss import MakeSideLoss
from ibp_deepspeed.optimizer.configured import is_muon, muon_params
from ibp_deepspeed.optimizer.gradient_norm import drop_gradients, gradient_norm, not_made
from ibp_deepspeed.optimizer.learning_rate import configured_schedule
from ibp_deepspeed.optimizer.matrices import inner_matrices, muon_groups
from ibp_deepspeed.optimizer.parameter_groups import parameter_groups
from ibp_deepspeed.running_statistics import RunningStatistics
from ibp_deepspeed.single_process.checkpointing import SingleProcessCheckpoints
from ibp_deepspeed.single_process.full_precision import FullPrecisionSums
from ibp_deepspeed.single_process.reference import Sample

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.AdamW,  # DeepSpeed's "Adam" decays weights as AdamW does, unless adam_w_mode is off
    "sgd": torch.optim.SGD,
}
_KEPT = 1000  # reports that nobody has taken
_DEEPSPEED_ONLY = ("torch_adam", "adam_w_mode")


class VirtualPipeline:
    """One process that trains K stages, each with its own optimizer, as one replica of a pipeline.

    Its methods are named as the engine's; :meth:`train_batch` returns all K losses instead of one stage's.

    Args:
        stages: K trunks of layers.
        aux_heads: K-1 heads, None where a stage is no exit; or None for backpropagation without heads.
        loss_fn: ``loss_fn(outputs, labels)`` → scalar.
        ds_config: a DeepSpeed configuration with its ``"interlocking"`` block. Optimizers: Adam, AdamW, Muon, SGD;
            learning-rate schedules: DeepSpeed's and WarmupStableDecayLR. bf16 keeps fp32 master weights and sums
            gradients in fp32.
        device: where everything is put.
        monitor: DeepSpeed's MonitorMaster, for what stages report every ``steps_per_print`` batches.
        side_loss: see :class:`InterlockedReference`.

    Attributes:
        reference: the stages, heads and gradients.
        num_stages: K.
        global_rank: 0.

    Raises:
        ConfigError: a setting that only works with processes, or an unknown optimizer or schedule.
    """

    def __init__(
        self,
        stages: Sequence[nn.Sequential],
        aux_heads: Sequence[nn.Module | Objective | None] | None,
        loss_fn: Callable[[Any, Any], Tensor],
        ds_config: Mapping[str, Any],
        device: torch.device | str = "cpu",
        monitor: Any = None,
        side_loss: MakeSideLoss | None = None,
    ) -> None:
        check_ds_config(ds_config)
        self.ds_config, self.monitor, self.global_rank = dict(ds_config), monitor, 0
        self.device = torch.device(device)
        self._micro_batches, self._micro_batch_size = _batch_sizes(ds_config)
        dtype = torch.bfloat16 if is_enabled(ds_config, "bf16") else None
        for part in (*stages, *(head for head in aux_heads or () if head is not None)):
            module = part.module if isinstance(part, Objective) else part
            module.to(device=self.device, dtype=dtype)
            RunningStatistics([module])  # which stay in fp32
        self.reference = FullPrecisionSums(stages, aux_heads, loss_fn, resolve_interlocking(ds_config), side_loss)
        if self.reference.interlocking.compile:
            compile_layers(
                [layer for stage in stages for layer in stage], [*self.reference.aux_heads.values()], self.device
            )
        self.num_stages = len(stages)
        self.optimizers = [self._optimizer(k) for k in range(self.num_stages)]
        schedule = configured_schedule(ds_config)
        self.schedulers: list[Any] = [
            None if schedule is None else schedule(optimizer) for optimizer in self.optimizers
        ]
        sizes = self._micro_batches, self.train_batch_size()
        self._checkpoints = SingleProcessCheckpoints(self.reference, self.optimizers, self.schedulers, *sizes)
        self._losses: Tensor | None = None
        self._reports: deque[measures.Report] = deque(maxlen=_KEPT)
        self._seconds: list[float] = []

    @property
    def global_steps(self) -> int:
        """Batches trained."""
        return self.reference.batch

    def gradient_accumulation_steps(self) -> int:
        """M."""
        return self._micro_batches

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples a micro-batch."""
        return self._micro_batch_size

    def train_batch_size(self) -> int:
        """Samples a batch."""
        return self._micro_batches * self._micro_batch_size

    def latest_losses(self) -> tuple[Tensor, int] | None:
        """The K losses of the newest batch and its number (from 1); None before the first."""
        return None if self._losses is None else (self._losses, self.global_steps)

    def losses_after(self, batch: int) -> list[tuple[Tensor, int]]:
        """The newest, if they are of a batch after that one."""
        newest = self.latest_losses()
        return [] if newest is None or newest[1] <= batch else [newest]

    def train_batch(self, data_iter: Iterator[Any]) -> Tensor:
        """Train all stages on the next M micro-batches (inputs, labels[, ids]); returns their K losses, float64."""
        began = time.perf_counter()
        self._train(True)
        losses = self._accumulate(self._take(data_iter, self._micro_batches))
        due = self._is_due()
        report = [self._measured(k) for k in range(self.num_stages)] if due else []
        self._clip()
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
        self.reference.masters_to_weights()
        self._losses = losses
        self._seconds.append(time.perf_counter() - began)
        if due:
            self._report(report, losses.tolist())
        return losses

    def eval_batch(
        self,
        data_iter: Iterator[Any],
        num_micro_batches: int | None = None,
        measure: Callable[[Any, Any], Tensor] | None = None,
    ) -> Tensor:
        """Means of the K held-out losses (or of another ``measure(outputs, labels)``) over micro-batches. [K]."""
        self._train(False)
        return self.reference.evaluate(self._take(data_iter, num_micro_batches or self._micro_batches), measure)

    def _accumulate(self, micro_batches: Sequence[Sample]) -> Tensor:
        """Gradients of all stages, into ``grad``; returns the K losses."""
        return self.reference.accumulate(micro_batches)

    def new_reports(self, patience: float = 0.0) -> list[measures.Report]:
        """What the stages measured, every ``steps_per_print`` batches, since this was called last: losses, norms of
        gradients, learning rates, and the time of a batch; there is neither waiting nor memory of a stage."""
        taken = list(self._reports)
        self._reports.clear()
        return taken

    def _is_due(self) -> bool:
        interval = self.ds_config.get("steps_per_print", 10)
        return bool(interval) and self.global_steps % interval == 0

    def _measured(self, stage: int) -> dict[str, float]:
        """Before the step, when gradients are complete and not yet clipped."""
        names = (measures.TRUNK_NORM, measures.HEAD_NORM)
        parts = self.reference.masters_by_part(stage)
        norms = {name: gradient_norm(part).item() for name, part in zip(names, parts, strict=False)}
        own = self.reference.side_means.get(stage, {})
        return {**norms, **own, measures.LEARNING_RATE: self.optimizers[stage].param_groups[0]["lr"]}

    def _report(self, measured: list[dict[str, float]], losses: list[float]) -> None:
        seconds, self._seconds = sum(self._seconds) / len(self._seconds), []
        rows = [
            measures.without_nan({measures.LOSS: loss, **values, measures.BATCH_TIME: seconds})
            for loss, values in zip(losses, measured, strict=True)
        ]
        self._reports.append(measures.Report(self.global_steps, rows))
        if self.monitor is not None and self.monitor.enabled:
            self.monitor.write_events(measures.events(self.global_steps, rows))

    @property
    def data_parallel_rank(self) -> int:
        """0: there is one replica."""
        return 0

    @property
    def refresh_bytes(self) -> int:
        """0: no copy of an LM head travels."""
        return 0

    @property
    def layer_bytes(self) -> int:
        """0: no copy of layers travels."""
        return 0

    @property
    def load_report(self) -> list[str]:
        """What the last :meth:`load_checkpoint` had to change, for the user; empty if nothing."""
        return self._checkpoints.load_report

    def save_checkpoint(
        self, save_dir: str | Path, tag: str | None = None, *, files: Mapping[str, str] | None = None
    ) -> None:
        """As the engine's: one replica without ZeRO; complete or not at all.

        Args:
            save_dir: folder of all checkpoints.
            tag: name of this one (default ``global_step<batches>``).
            files: texts to write into it, by file name.

        Raises:
            CheckpointError: it can't be written.
        """
        self._checkpoints.save(Path(save_dir), tag, files or {})

    def load_checkpoint(self, load_dir: str | Path, tag: str | None = None) -> None:
        """Read a checkpoint of a VirtualPipeline or of an engine, of any shape.

        Raises:
            CheckpointError: there is none, a file is missing, damaged or doesn't fit.
        """
        self._checkpoints.load(Path(load_dir), tag)

    def close(self) -> None:
        """As the engine's; nothing is open here."""

    def _optimizer(self, stage: int) -> torch.optim.Optimizer:
        block = self.ds_config.get("optimizer", {})
        name, options = str(block.get("type", "")), dict(block.get("params", {}))
        if is_muon(self.ds_config):
            return self._muon(stage, muon_params(options))
        if name.lower() not in _OPTIMIZERS:
            raise ConfigError(f'virtual stages train with Adam, AdamW, Muon or SGD; "optimizer.type" is {name!r}.')
        if not options.get("adam_w_mode", True):
            raise ConfigError('virtual stages have no Adam without "adam_w_mode": use AdamW.')
        kept = {key: value for key, value in options.items() if key not in _DEEPSPEED_ONLY}
        if "betas" in kept:
            kept["betas"] = tuple(kept["betas"])
        defaults = {} if name.lower() == "sgd" else {"weight_decay": 0.01 if name.lower() == "adamw" else 0.0}
        groups = parameter_groups(self._trained(stage), self.reference.interlocking.decay)
        return _OPTIMIZERS[name.lower()](groups, **{**defaults, **kept})

    def _muon(self, stage: int, options: dict[str, Any]) -> torch.optim.Optimizer:
        from ibp_deepspeed.optimizer.muon import Muon  # takes seconds to import

        trunk, *heads = self.reference.modules(stage)
        assert isinstance(trunk, nn.Sequential)
        last = stage == self.num_stages - 1
        matrices = inner_matrices([*trunk], first=stage == 0, last=last, head=heads[0] if heads else None)
        masters = [self.reference.master(p) for p in matrices]
        return Muon(muon_groups(self._trained(stage), masters, self.reference.interlocking.decay), **options)

    def _trained(self, stage: int) -> list[nn.Parameter]:
        """As in the engine one number where there is nothing to train."""
        return self.reference.masters(stage) or [nn.Parameter(torch.zeros(1, device=self.device))]

    def _clip(self) -> None:
        """As the engine: clip by the norm of clip_scope, and no step where that is not finite, or the end."""
        limit = self.ds_config.get("gradient_clipping", 1.0)  # DeepSpeed's default
        scopes = {f"stage {k}": self.reference.masters(k) for k in range(self.num_stages)}
        if limit and self.reference.interlocking.clip_scope == "global":
            scopes = {"all stages": [p for scope in scopes.values() for p in scope]}
        for name, scope in scopes.items():
            norm = gradient_norm(scope)
            if not bool(norm.isfinite()):
                drop_gradients(scope)
                logger.warning(not_made(self.reference.interlocking.non_finite, name, self.global_steps))
            elif limit:
                torch.nn.utils.clip_grads_with_norm_(scope, limit, norm)

    def _take(self, data_iter: Iterator[Any], count: int) -> list[Sample]:
        if not hasattr(data_iter, "__next__"):
            raise BatchError(
                f"a {type(data_iter).__name__} would begin again with every batch: make iter(…) of it once, and give "
                "that every time."
            )
        rows = [self._on_device(row) for row in islice(data_iter, count)]
        if len(rows) < count:
            raise BatchError(f"the data ended after {len(rows)} of {count} micro-batches: give a repeating iterator.")
        return rows

    def _on_device(self, row: Any) -> Sample:
        inputs, labels = to_device(unpack(row)[:2], self.device)
        return inputs, labels, Documents.of(position_ids(row), self.device)

    def _train(self, mode: bool) -> None:
        for module in (*self.reference.stages, *self.reference.aux_heads.values()):
            module.train(mode)


def _batch_sizes(ds_config: Mapping[str, Any]) -> tuple[int, int]:
    """M and samples a micro-batch, from any two of DeepSpeed's three keys."""
    total, size = ds_config.get("train_batch_size"), ds_config.get("train_micro_batch_size_per_gpu")
    count = ds_config.get("gradient_accumulation_steps")
    if count is None:
        count = total // size if total and size else 1
    size = size or (total // count if total else None)
    if size is None or (total is not None and total != size * count):
        raise ConfigError(
            f"train_batch_size {total}, train_micro_batch_size_per_gpu {size} and gradient_accumulation_steps {count} "
            "do not say how large a micro-batch of one replica is."
        )
    return count, size
