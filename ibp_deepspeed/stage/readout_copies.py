"""What one stage does for heads that follow the last stage's LM head, or have it as it was at the start."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import log_dist
from torch import Tensor

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.comm.late_relay import LateRelay
from ibp_deepspeed.comm.link_groups import new_host_group
from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.errors import InterlockingError, ModuleError
from ibp_deepspeed.objectives.shared_readout import (
    ReadoutSource,
    RefreshRule,
    fill_pending,
    install,
    source_readout,
)
from ibp_deepspeed.stage.late_parts import LatePart, on_host, shapes
from ibp_deepspeed.stage.module import InterlockedPipelineModule


class ReadoutCopies(LatePart):
    """The LM head of the last stage, or a head's copy of it, or with borrowed layers both.

    Made at the same time on all ranks. From then on all copies are equal to the last stage's LM head, and the batches
    decide alone when they change.

    Args:
        module: this stage.
        grid: DeepSpeed's grid of stages and data-parallel ranks.
        rule: when copies are taken and used; None: never again.

    Attributes:
        refresh_bytes: of one copy.

    Raises:
        ModuleError: on all ranks of the pipeline, a stage without such an LM head, or copies that don't fit it or are
            trained.
    """

    def __init__(self, module: InterlockedPipelineModule, grid: Any, rule: RefreshRule | None) -> None:
        self.stage, self.rule = grid.get_stage_id(), rule
        self._last = grid.pipe_parallel_size - 1
        self._writes = self.stage == self._last and grid.get_data_parallel_rank() == 0
        group = new_host_group()
        self._ranks = [grid.stage_to_global(k) for k in range(grid.pipe_parallel_size)]
        self._tensors = _Tensors(module, self.stage == self._last)
        self._like = self._tensors.agreed(group, self._ranks)
        self.refresh_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._like)
        self._start_equal(group, grid.topology().get_axis_comm_lists("pipe")[0][-1])
        self._beta = rule.average if rule and self.stage == self._last else None
        self._source = ReadoutSource(on_host(self._tensors.source), self._beta)
        self._taken: dict[int, list[Tensor]] = {}
        ways = dict(enumerate(self._ranks))
        self._relay = LateRelay(group, ways, self.stage, self._like, what="readouts") if rule else None
        if rule is not None:
            log_dist(
                f"heads follow the last stage's LM head: {self.refresh_bytes / 2**20:.1f} MiB every {rule.interval} "
                f"batches, used {rule.delay} batches later",
                ranks=[0],
            )

    @classmethod
    def from_config(
        cls, interlocking: InterlockingConfig, module: InterlockedPipelineModule, grid: Any, micro_batches: int
    ) -> ReadoutCopies | None:
        """What a configuration asks for; None if the heads have private LM heads, or there are none."""
        stages = grid.pipe_parallel_size
        if not module.placement.heads or interlocking.aux_head is None or interlocking.aux_head.readout == "private":
            return None
        return cls(module, grid, RefreshRule.from_config(interlocking, stages, micro_batches))

    def begin_batch(self, batch: int) -> None:
        """Take the copy, and use the copy, that the rule names for the beginning of ``batch`` (from 0).

        Raises:
            PeerLostError: the copy can't come any more.
        """
        if self.rule is None or self._relay is None:
            return
        if self.stage == self._last and self.rule.takes(batch):
            self._taken[batch] = self._source.take(on_host(self._tensors.source))
            self._relay.send(batch, self._taken[batch])
        taken = self.rule.used_from(batch)
        if taken is not None:
            self._collect(taken)
            newest = self._taken.pop(taken)
            if self._tensors.copies:
                install(self._tensors.copies, newest)

    def save(self, folder: str, batch: int, checkpoint_engine: Any) -> None:
        """Write the copies that are taken but not yet used before ``batch`` to a checkpoint."""
        if self.rule is not None and self._writes:
            taken = {taken: self._taken[taken] for taken in self.rule.pending(batch)}
            state = {"taken": taken, "average": self._source.average}
            checkpoint_engine.save(state_dict=state, path=os.path.join(folder, layout.SHARED_READOUT))

    def settle(self, batch: int) -> None:
        """Wait until no copy is on its way, before another checkpoint than that of ``batch`` is loaded."""
        for taken in self.rule.pending(batch) if self.rule else []:
            self._collect(taken)

    def load(self, folder: str, batch: int, checkpoint_engine: Any, *, strict: bool = True) -> None:
        """Have the copies that a run which resumes at ``batch`` needs, and no others, from a checkpoint.

        Args:
            folder: of the checkpoint.
            batch: the next one.
            checkpoint_engine: DeepSpeed's.
            strict: refuse a checkpoint that lacks one; otherwise the newest before it takes its place, or what the head
                has now.

        Raises:
            InterlockingError: the checkpoint lacks one.
        """
        if self.rule is None:
            return
        pending, path = self.rule.pending(batch), os.path.join(folder, layout.SHARED_READOUT)
        exists = os.path.exists(path)
        state = checkpoint_engine.load(path, map_location=torch.device("cpu")) if exists else {}
        saved = state.get("taken", {})
        lacking = [taken for taken in pending if taken not in saved]
        if lacking and not strict:
            fill_pending(
                saved, pending, on_host(self._tensors.source) or [tensor.to("cpu") for tensor in self._tensors.copies]
            )
        elif lacking:
            held = f"holds those of batches {sorted(saved)}" if exists else "does not exist"
            raise InterlockingError(
                f"batch {batch} and later need the LM head as it was when batch {lacking[0]} began, but {path} {held}: "
                "resume with the readout, refresh_interval and refresh_delay that the checkpoint was trained with."
            )
        self._taken = {taken: saved[taken] for taken in pending}
        # without one (another configuration, or before the first copy) the average begins at the LM head loaded
        average = state.get("average")
        self._source = ReadoutSource(on_host(self._tensors.source) if average is None else average, self._beta)

    def close(self, *, wait: bool) -> None:
        """End the background thread; ``wait`` until the last stage has no more copies to send."""
        if self._relay is not None:
            self._relay.close(wait=wait)

    def _collect(self, taken: int) -> None:
        """Wait for a copy."""
        if taken not in self._taken:
            assert self._relay is not None
            self._taken[taken] = self._relay.take(taken)

    def _start_equal(self, group: dist.ProcessGroup, first: int) -> None:
        """All replicas' last stages are equal: those of the first one serve all."""
        source = on_host(self._tensors.source) or [torch.empty_like(tensor, device="cpu") for tensor in self._like]
        for tensor in source:
            dist.broadcast(tensor, first, group=group)
        if self._tensors.copies:
            install(self._tensors.copies, source)


class _Tensors:
    """The tensors of one stage.

    Attributes:
        source: the last stage's LM head, there alone.
        copies: what this stage's head has in its place.
        error: what is wrong with them, for all stages to raise.
    """

    def __init__(self, module: InterlockedPipelineModule, is_last: bool) -> None:
        self.source: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.error: str | None = None
        try:
            if is_last:
                self.source = source_readout(module, but=module.aux_head)
            for objective in module.objectives.values():
                self.copies += objective.copied_readout()
        except InterlockingError as error:
            self.error = str(error)
        if any(tensor.requires_grad for tensor in self.copies):
            self.error = (
                f"the copied LM head of a {type(module.aux_head).__name__} is trained too: set requires_grad to False."
            )

    def agreed(self, group: dist.ProcessGroup, ranks: Sequence[int]) -> list[Tensor]:
        """The last stage's LM head on the meta device, after all stages have found their tensors fitting."""
        seen: list[Any] = [None] * group.size()
        dist.all_gather_object(seen, (self.error, shapes(self.source), shapes(self.copies)), group=group)
        for error, _, _ in seen:
            if error:
                raise ModuleError(error)
        source = seen[ranks[-1]][1]
        for k, (_, _, copies) in enumerate(seen[rank] for rank in ranks):
            if copies and copies != source:
                raise ModuleError(f"the head of stage {k} copies an LM head of {copies}, the last stage's is {source}.")
        return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in source]
