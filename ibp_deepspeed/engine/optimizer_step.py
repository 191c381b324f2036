"""From the gradients of a stage to its step: sums, reduction over replicas, clipping."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from ibp_deepspeed.config.interlocking import InterlockingConfig


class SteppingEngine(PipelineEngine):
    """DeepSpeed's pipeline engine with this package's rules for what happens between the gradients and the step."""

    interlocking: InterlockingConfig

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

    def clip_fp32_gradients(self) -> None:
        """Overrides DeepSpeedEngine's, whose norm spans the pipeline: clip by the norm of clip_scope.

        Gradients are averaged over data-parallel ranks already, so the norm needs no reduction there.
        """
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if not gradients:
            return
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.interlocking.clip_scope == "global":
            squared = norm.square()
            dist.all_reduce(squared, group=self.grid.get_pipe_parallel_group())
            norm = squared.sqrt()
        self._global_grad_norm = norm
        torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), self.gradient_clipping(), norm)
