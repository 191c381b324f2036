"""From the gradients of a stage to its step: sums, reduction over replicas, clipping."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import MUON_OPTIMIZER
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import logger
from torch import nn

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.optimizer.configured import muon_params
from ibp_deepspeed.optimizer.gradient_norm import drop_gradients, gradient_norm, not_made
from ibp_deepspeed.stage.losses import StageLosses


class SteppingEngine(PipelineEngine):
    """DeepSpeed's pipeline engine with this package's rules for what happens between the gradients and the step."""

    interlocking: InterlockingConfig
    _losses: StageLosses
    mpu: Any
    _states_are_linked = False

    @cached_property
    def _parameters_of_stage(self) -> list[nn.Parameter]:
        """All of them; walking through the modules in every batch costs as much as a small stage's step."""
        return list(self.module.parameters())

    def zero_grad(self) -> None:
        """Overrides DeepSpeedEngine's, which walks through the modules."""
        drop_gradients(self._parameters_of_stage)

    def _configure_basic_optimizer(self, model_parameters: Any) -> torch.optim.Optimizer:
        """Overrides DeepSpeedEngine's: Muon is this package's, in groups that ``initialize`` has made.

        DeepSpeed's own takes the matrices that ``deepspeed.initialize`` has marked, by the words "embed" and "lm_head"
        that names of a pipeline's layers don't have, and needs rates of its own for them.
        """
        if self.optimizer_name() != MUON_OPTIMIZER:
            made: torch.optim.Optimizer = super()._configure_basic_optimizer(model_parameters)
            return made
        from ibp_deepspeed.optimizer.muon import Muon  # takes seconds to import

        return Muon(model_parameters, **muon_params(self.optimizer_params() or {}))

    def _configure_bf16_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        """Overrides DeepSpeedEngine's: BF16_Optimizer refuses Muon beside any ``mpu``, for the sake of matrices that
        are divided among processes. Ours says over which stages norms are taken, and ``None`` means each stage's own.
        """
        mpu: Any = self.mpu
        if self.optimizer_name() == MUON_OPTIMIZER:
            self.mpu = None
        try:
            return super()._configure_bf16_optimizer(optimizer)
        finally:
            self.mpu = mpu

    @contextmanager
    def _accumulating(self) -> Iterator[None]:
        """Around every backward pass into parameters: head and trunk come at different times, and each pass must
        reach the fp32 gradients that BF16_Optimizer keeps, once."""
        if self.using_bf16_optimizer:
            self.optimizer.clear_lp_grads(set_to_none=True)
        yield
        if self.using_bf16_optimizer:
            self.optimizer.update_hp_grads()

    def _exec_reduce_grads(self) -> None:
        """Overrides PipelineEngine's: a replica that is alone has nothing to reduce.

        PipelineEngine reduces BF16_Optimizer's sums (``_bf16_reduce_grads``) also over a group of one, and
        ``DeepSpeedEngine.allreduce_bucket`` casts them to ``communication_data_type`` (bf16 by default with bf16) and
        back: fp32 sums were rounded to bf16 before every step. With several replicas ``initialize`` makes that type
        fp32 where sums are fp32. ZeRO's own optimizer is called in any case: it collects the gradients there, and casts
        alike (``DeepSpeedZeroOptimizer.gradient_reduction_w_predivide``), but its sums are never wider.
        """
        if self.is_data_parallel or (self.zero_optimization() and not self.using_bf16_optimizer):
            super()._exec_reduce_grads()

    def _take_model_step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Overrides DeepSpeedEngine's: gradients that are not finite end the training, or cost one stage one step.

        DeepSpeed's bf16 and ZeRO optimizers leave such a step out (``overflow``), in silence, and with it
        the step of the learning rate's schedule, which then stays behind that of the other stages. torch's own
        optimizers step with whatever there is, and the stage's weights are NaN from then on.

        Raises:
            NonFiniteError: with ``"non_finite": "stop"``.
        """
        self._before_step()
        skipped = self.skipped_steps
        if self.optimizer is self.basic_optimizer:
            self._norm_or_no_gradients()
        elif self.using_bf16_optimizer:
            self._take_part_without_gradients()
        with self._step_runs():
            super()._take_model_step(lr_kwargs)
        if self.skipped_steps == skipped:
            self._link_states_of_all_groups()
            return
        if self.optimizer is not self.basic_optimizer and self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))
        said = not_made(
            self.interlocking.non_finite, f"stage {self.stage_id}", self.global_steps, self._losses.not_finite()
        )
        if self.grid.get_data_parallel_rank() == 0:
            logger.warning(said)

    def _step_runs(self) -> AbstractContextManager[None]:
        """How: BF16_Optimizer calls DeepSpeed's compiled functions for Muon before the optimizer's own step."""
        if self.optimizer_name() != MUON_OPTIMIZER:
            return nullcontext()
        from ibp_deepspeed.optimizer.muon import eagerly

        return eagerly()

    def _before_step(self) -> None:
        """Called when gradients are complete, averaged over replicas, and neither clipped nor dropped."""

    def _norm_or_no_gradients(self) -> None:
        """For torch's optimizers, with fp32: the norm of ``clip_scope``, and no gradients if that is not finite.

        Gradients are averaged over data-parallel ranks already, so the norm needs no reduction there. All stages take
        part in a norm of the pipeline, those without a gradient too.
        """
        norm = gradient_norm(self._parameters_of_stage).to(self.device)
        if self.interlocking.clip_scope == "global" and self.gradient_clipping() > 0:
            squared = norm.double().square()  # of one type, whatever the stages' gradients are
            dist.all_reduce(squared, group=self.grid.get_pipe_parallel_group())
            norm = squared.sqrt().to(norm.dtype)
        self._global_grad_norm = norm
        if not bool(norm.isfinite()):
            self.skipped_steps += 1
            drop_gradients(self._parameters_of_stage)

    def clip_fp32_gradients(self) -> None:
        """Overrides DeepSpeedEngine's, whose norm spans the pipeline: clip by the norm that the step began with."""
        limit, norm = self.gradient_clipping(), self._global_grad_norm
        torch.nn.utils.clip_grads_with_norm_(self._parameters_of_stage, limit, norm)

    def _link_states_of_all_groups(self) -> None:
        """DeepSpeedZeroOptimizer links parameters with their moments after the first group's first step
        (``_optimizer_step``), when the next group has none: ``safe_get_full_optimizer_state`` does not find them."""
        if self._states_are_linked or not self.zero_optimization() or self.using_bf16_optimizer:
            return
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()
        self._states_are_linked = True

    def _take_part_without_gradients(self) -> None:
        """BF16_Optimizer's norm fails on a stage without any gradient, while the others may wait for its part
        (``get_global_norm_of_tensors``): its sums, which are zeros, count then."""
        received = self.optimizer.fp32_groups_has_gradients
        if not any(any(group) for group in received):
            self.optimizer.fp32_groups_has_gradients = [[True] * len(group) for group in received]
