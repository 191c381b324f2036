"""The engine: follows the validated schedule, and owns scale, channels and losses."""

from __future__ import annotations

import atexit
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ibp_deepspeed.comm.loss_board import LossBoard
from ibp_deepspeed.comm.stage_links import StageLinks
from ibp_deepspeed.compilation import compile_layers
from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.engine.checkpointing import EngineCheckpoints
from ibp_deepspeed.engine.evaluation import evaluate
from ibp_deepspeed.engine.execution import ExecutingEngine
from ibp_deepspeed.engine.moment import locate, place_of
from ibp_deepspeed.engine.recorder import Recorder
from ibp_deepspeed.engine.reporting import Reporting
from ibp_deepspeed.engine.watchdog import Position, Watchdog
from ibp_deepspeed.errors import InterlockingError, TraceError
from ibp_deepspeed.measures import Report
from ibp_deepspeed.running_statistics import RunningStatistics
from ibp_deepspeed.schedule.generator import InterlockedTrainSchedule
from ibp_deepspeed.schedule.validate import ScheduleMaker, validated_timeline
from ibp_deepspeed.stage.late_answers import LateAnswers
from ibp_deepspeed.stage.late_parts import LatePart
from ibp_deepspeed.stage.losses import StageLosses
from ibp_deepspeed.stage.meters import StageMeters
from ibp_deepspeed.stage.module import InterlockedPipelineModule
from ibp_deepspeed.stage.readout_copies import ReadoutCopies
from ibp_deepspeed.stage.sample_ledger import SampleLedger
from ibp_deepspeed.stage.slow_layer_copies import SlowLayerCopies
from ibp_deepspeed.stage.weight_gradients import WeightGradients, split_backward
from ibp_deepspeed.strategy.timeline import Timeline
from ibp_deepspeed.trace.spans import LATE

_FLUSH_SECONDS = 30.0


class InterlockedPipelineEngine(ExecutingEngine):
    """Trains an :class:`InterlockedPipelineModule`. Made by :func:`ibp_deepspeed.initialize`.

    Streams across batches: a stage starts its next batch as soon as its own optimizer step is done, and waits for
    another stage only where the mathematics does. Every loss is divided by M once, where it is computed; DeepSpeed's
    scaling hooks are not used.

    Attributes:
        interlocking: the configuration.
        timeline: the strategies of all batches.
    """

    module: InterlockedPipelineModule
    _planned_recorder: Recorder | None
    make_schedule: ScheduleMaker = staticmethod(InterlockedTrainSchedule.for_batch)
    """What makes the schedule of a batch and a stage; another one is validated as this one is."""

    def __init__(self, *args: Any, interlocking: InterlockingConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.interlocking = interlocking
        self.position = Position()
        self.pipe_buffers: dict[str, list[Any]] = {"in_flight": []}
        self.recomputations = 0
        # The stage is checkpointed by hand (micro_batch.py): DeepSpeed's functions recompute for every gradient.
        self._recompute = self.module.activation_checkpoint_interval > 0
        self.module.activation_checkpoint_interval = 0
        if interlocking.compile:
            head = self.module.aux_head
            compile_layers(self.module.forward_funcs, [] if head is None else [head], torch.device(self.device))
        self._trunk_parameters = self.module.trunk_parameters()
        self._statistics = RunningStatistics(self.module.children())
        self._borrowed = self.module.placement.borrowed_from(self.stage_id)
        self._set_schedule()
        self.links = StageLinks(self.grid, self.device, self._channel_depth)
        self._readouts = ReadoutCopies.from_config(interlocking, self.module, self.grid, self.micro_batches)
        self._answers = LateAnswers.from_module(
            self.module, self.grid, self.micro_batches, self.device, self._learn_late
        )
        self._slow_layers = SlowLayerCopies.from_config(interlocking, self.module, self.grid, self.micro_batches)
        parts = self._readouts, self._slow_layers, self._answers
        self._late: list[LatePart] = [part for part in parts if part is not None]
        self._checkpoints = EngineCheckpoints(self, self._late)
        self._losses = StageLosses(self.grid, self.device)
        self._board = LossBoard.of_engine(self.num_stages, self._channel_depth // self.micro_batches)
        self._meters = StageMeters(self.links.waits)
        self._reporting = Reporting(self, self._meters)
        self._ledger = SampleLedger(self.stage_id)
        self._due = deque()
        self._weight_gradients = WeightGradients()
        if any(strategy.splits(self.stage_id) for strategy in self.timeline.strategies()):
            split_backward(self.module.forward_funcs, self._weight_gradients)
        self._recorder = self._planned_recorder = None
        self._failed = False
        self._watchdog = Watchdog.of_engine(
            self.position, self.stage_id, self.data_parallel_rank, interlocking.watchdog_seconds
        )
        self._running_engine_backward = True  # for DeepSpeed's hooks: all backward passes are the engine's
        atexit.register(self._close_at_exit)

    # What DeepSpeed's hooks ask for

    def _set_schedule(self) -> None:
        about = self.num_stages, self.micro_batches, self.module.has_aux_heads, self.module.frozen_stages
        self.timeline = Timeline(self.interlocking, *about)
        self._channel_depth = self.timeline.channel_depth()
        schedules = validated_timeline(self.timeline, self.make_schedule)
        self._schedules = {strategies: stages[self.stage_id] for strategies, stages in schedules.items()}
        self._schedule = self._train_schedule()

    def _train_schedule(self) -> InterlockedTrainSchedule:
        """Overrides PipelineEngine's: the object that was validated, for the batch at hand."""
        return self._schedules[self.timeline.at(self.global_steps)]

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Overrides PipelineEngine's: another number of micro-batches needs another schedule."""
        super().set_train_batch_size(train_batch_size)
        self._set_schedule()
        self.links.depth = self._channel_depth

    def set_dataloader(self, loader: Any) -> None:
        """Overrides PipelineEngine's: every stage reads data, for its labels."""
        self.training_dataloader = loader
        self.data_iterator = iter(loader)

    def set_dataiterator(self, iterator: Any) -> None:
        """Overrides PipelineEngine's: every stage reads data, for its labels."""
        self.training_dataloader = None
        self.data_iterator = iterator

    def reset_activation_shape(self) -> None:
        """Overrides PipelineEngine's.

        Raises:
            InterlockingError: always; receives for the next batch are posted already.
        """
        raise InterlockingError("the shape of hidden states can't change while training streams: pad to one shape.")

    # Public

    def train_batch(self, data_iter: Any = None) -> Tensor:
        """Train this stage on the next batch.

        Args:
            data_iter: iterator of micro-batches (inputs, labels) or (inputs, labels, sample ids), the same on every
                stage; M are taken. None continues the last one.

        Returns:
            this stage's loss: the mean over its micro-batches and data-parallel ranks, detached (NaN for a stage
            without a loss). No other stage is waited for to compute it. With borrowed layers the loss of the stage
            before is computed here, and returned, but for the last stage.

        Raises:
            BatchError: no data, or another stage sees other samples.
            PeerLostError: a neighbouring stage is gone.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() needs gradients enabled; use eval_batch() for evaluation")
        if data_iter is not None and data_iter is not self.data_iterator:
            self.set_dataiterator(data_iter)
        if not self.module.training:
            self.module.train()
        began = time.perf_counter()
        self._losses.clear()
        self._reporting.batch_begins()
        self._schedule = self._train_schedule()
        self._recorder = self._begin_recording()
        self.position.batch = self.global_steps + 1
        try:
            for part in self._late:
                with self._recording(LATE, -1):
                    part.begin_batch(self.global_steps)
            self._exec_schedule(self._schedule)
            if self._answers is not None:
                with self._recording(LATE, -1):
                    self._answers.end_batch()
            self.position.at("the mean of its losses")
            losses = self._losses.means(self.module.losses)
            if not self.interlocking.streaming:
                dist.barrier()
            self._end_recording()
            self.position.at(None)
        except BaseException as error:
            self._failed = True
            locate(error, place_of(self.position, self.stage_id, self.grid.stage_to_global))
            raise
        if self.grid.get_data_parallel_rank() == 0:
            self._board.publish(self.global_steps, losses)
        self._reporting.batch_ends(time.perf_counter() - began, losses)
        computed = list(self.module.objectives)
        return losses[computed[-1]] if computed else torch.full((), torch.nan, device=self.device)

    def trace_batches(self, first: int, last: int, path: str | Path) -> None:
        """Record what each rank does in batches ``first`` … ``last``, and when; called on all ranks, between batches.

        After the last of them all ranks meet once, and rank 0 writes a Chrome trace with the clocks of all aligned
        (:mod:`ibp_deepspeed.trace`). Other batches are as fast as ever.

        Args:
            first, last: from 1.
            path: of the file.

        Raises:
            TraceError: batches that are trained already, or none.
        """
        if not self.global_steps < first <= last:
            raise TraceError(
                f"can't trace batches {first} to {last}: batch {self.global_steps + 1} is the next one; "
                "give FIRST:LAST from there on."
            )
        self._planned_recorder = Recorder(first, last, Path(path), gpu=torch.device(self.device).type == "cuda")

    @property
    def refresh_bytes(self) -> int:
        """Bytes of one copy of the last stage's LM head that travels to the heads; 0 if none does."""
        if self._readouts is None or self._readouts.rule is None:
            return 0
        return self._readouts.refresh_bytes

    @property
    def late_bytes(self) -> int:
        """Bytes of the newest batch's late targets that came to this stage; 0 if none do."""
        return 0 if self._answers is None else self._answers.received_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of one copy of a stage's first layers that travels to the head before them; 0 if none does."""
        return 0 if self._slow_layers is None else self._slow_layers.copy_bytes

    @property
    def data_parallel_rank(self) -> int:
        """Whose part of the data this process reads."""
        rank: int = self.grid.get_data_parallel_rank()
        return rank

    def latest_losses(self) -> tuple[Tensor, int] | None:
        """On rank 0: the newest complete set of all K losses [K] and its batch's number (from 1); else None."""
        return self._board.latest() if self.global_rank == 0 else None

    def losses_after(self, batch: int) -> list[tuple[Tensor, int]]:
        """On rank 0: all K losses [K] of each batch after that one, and its number, as far as all stages have told them
        and they are remembered; elsewhere none."""
        return self._board.after(batch) if self.global_rank == 0 else []

    def new_reports(self, patience: float = 0.0) -> list[Report]:
        """On rank 0: what all stages measured, every ``steps_per_print`` batches, since this was called last.

        Args:
            patience: seconds to wait for stages that have trained as far and not reported yet.
        """
        return self._reporting.take(patience)

    @torch.no_grad()
    def eval_batch(  # type: ignore[override]
        self,
        data_iter: Any,
        num_micro_batches: int | None = None,
        measure: Callable[[Any, Any], Tensor] | None = None,
    ) -> Tensor:
        """Held-out losses of all exits; a synchronisation of the pipeline.

        Args:
            data_iter: as for :meth:`train_batch`; the training iterator is kept.
            num_micro_batches: how many to take (default M).
            measure: ``measure(outputs, labels)`` → what is measured instead of the losses, one number or several, [m];
                with ``weight(labels)``, if micro-batches do not count alike.

        Returns:
            the K losses, means over micro-batches (weighted by what counts in them, if the loss function says so) and
            data-parallel ranks, on every rank (NaN: no head). Shape [K], or [K, m] of a measure, float64.
        """
        training_iterator, training_loader = self.data_iterator, self.training_dataloader
        self.data_iterator = data_iter
        was_training = self.module.training
        self.module.eval()
        try:
            self._statistics.average(self.grid.get_data_parallel_group())
            losses = evaluate(self, num_micro_batches or self.micro_batches, measure)
            self.position.at(None)
            return losses
        except BaseException as error:
            self._failed = True
            locate(error, place_of(self.position, self.stage_id, self.grid.stage_to_global))
            raise
        finally:
            self.data_iterator, self.training_dataloader = training_iterator, training_loader
            self.module.train(was_training)

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> None:
        """Overrides PipelineEngine's to flush first, as a checkpoint is a synchronisation anyway; copies of the LM head
        that were taken and not yet used are saved too."""
        self.links.flush(None)
        super().module_state_dict(exclude_frozen_parameters)
        for part in self._late:
            part.save(self._curr_ckpt_path, self.global_steps, self.checkpoint_engine)

    def _before_step(self) -> None:
        """Overrides SteppingEngine's: gradients are as a report has them."""
        self._reporting.before_step()

    def close(self) -> None:
        """Wait until the neighbours have all messages, then end; happens by itself at the end of the process."""
        atexit.unregister(self._close_at_exit)
        self._watchdog.close()
        if not self._failed:
            self.links.flush(_FLUSH_SECONDS)
        self.links.close(wait=not self._failed)
        for part in self._late:
            part.close(wait=not self._failed)
        self._board.close()
        self._reporting.close()

    def _close_at_exit(self) -> None:
        self._failed = self._failed or getattr(sys, "last_value", None) is not None
        self.close()

    # Traces

    def _begin_recording(self) -> Recorder | None:
        """The recorder, if the batch at hand is to be recorded."""
        planned = self._planned_recorder
        return planned if planned is not None and planned.covers(self.global_steps + 1) else None

    def _end_recording(self) -> None:
        """After the last batch that is recorded: write."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None and self.global_steps == recorder.last:
            self._planned_recorder = None
            recorder.finish(self)
