"""What one stage does for heads with slow copies of the next stage's first layers: its own head, and the one before."""

from __future__ import annotations

import math
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
from ibp_deepspeed.config.objectives import MomentumOptions
from ibp_deepspeed.errors import InterlockingError, ModuleError
from ibp_deepspeed.objectives.shared_readout import RefreshRule, install
from ibp_deepspeed.objectives.slow_layers import START, Followed, begun_again, completed, first_layers, slow_rule
from ibp_deepspeed.stage.late_parts import LatePart, on_host, shapes
from ibp_deepspeed.stage.module import InterlockedPipelineModule

_WHAT = "copies of layers"


class SlowLayerCopies(LatePart):
    """This stage's first layers, if the head before them follows them, and its own head's copies of the next stage's.

    Made at the same time on all ranks. From then on a head's copies are what the rule makes of the next stage's layers.

    Args:
        module: this stage.
        grid: DeepSpeed's grid of stages and data-parallel ranks.
        rule: when copies are taken and used.
        layers: of a stage that are copied.

    Attributes:
        copy_bytes: of one copy; of the largest, if they differ.
        load_report: what the last :meth:`load` had to change, for the user; empty if nothing.

    Raises:
        ModuleError: on all ranks, a stage with fewer layers, or a head without such copies, or with others.
    """

    def __init__(self, module: InterlockedPipelineModule, grid: Any, rule: RefreshRule, layers: int) -> None:
        self.rule, stage = rule, grid.get_stage_id()
        self.load_report: list[str] = []
        self._writes = grid.get_data_parallel_rank() == 0
        group, ranks = new_host_group(), [grid.stage_to_global(k) for k in range(grid.pipe_parallel_size)]
        tensors = _Tensors(module, stage, layers)
        self.copy_bytes = tensors.agree(group, ranks, module.placement.heads)
        self._followed = self._head = None
        if tensors.followed:
            way = LateRelay(group, {k: ranks[k] for k in (stage - 1, stage)}, stage, tensors.followed, what=_WHAT)
            self._followed = _FollowedStage(tensors.followed, module.parts[stage], rule, way)
        if tensors.copies:
            way = LateRelay(group, {k: ranks[k] for k in (stage, stage + 1)}, stage, tensors.copies, what=_WHAT)
            self._head = _FollowingHead(tensors.copies, module.parts[stage + 1], rule, way)
        if self._head is not None:
            self._head.begin()
        log_dist(
            f"heads follow the first layers of the next stage: {self.copy_bytes / 2**20:.1f} MiB every {rule.interval} "
            f"batches, used {rule.delay} batches later",
            ranks=[0],
        )

    @classmethod
    def from_config(
        cls, interlocking: InterlockingConfig, module: InterlockedPipelineModule, grid: Any, micro_batches: int
    ) -> SlowLayerCopies | None:
        """What a configuration asks for; None if no head has such copies, or there are none."""
        rule, options = slow_rule(interlocking, micro_batches), interlocking.aux_head
        objective = None if options is None else options.objective
        if rule is None or not isinstance(objective, MomentumOptions) or not module.placement.heads:
            return None
        return cls(module, grid, rule, objective.layers)

    def begin_batch(self, batch: int) -> None:
        """Take and send, or use, the copies that the rule names for the beginning of ``batch`` (from 0).

        Raises:
            PeerLostError: a copy can't come any more.
        """
        if self._followed is not None:
            self._followed.begin_batch(batch)
        if self._head is not None:
            self._head.begin_batch(batch)

    def save(self, folder: str, batch: int, checkpoint_engine: Any) -> None:
        """Write the average of this stage's layers, and what is taken but not yet used before ``batch``."""
        if self._followed is not None and self._writes:
            self._followed.save(folder, batch, checkpoint_engine)

    def settle(self, batch: int) -> None:
        """Wait until no copy is on its way, before another checkpoint than that of ``batch`` is loaded."""
        if self._head is not None:
            self._head.collect(self.rule.pending(batch))

    def load(self, folder: str, batch: int, checkpoint_engine: Any, *, strict: bool = True) -> None:
        """Have what a run that resumes at ``batch`` needs, and nothing else, from a checkpoint.

        Args:
            folder: of the checkpoint.
            batch: the next one.
            checkpoint_engine: DeepSpeed's.
            strict: refuse a checkpoint that lacks something; otherwise copies and averages that it lacks begin as the
                layers are now, which is reported.

        Raises:
            InterlockingError: it does.
        """
        where = folder, batch, checkpoint_engine
        if self._followed is not None:
            self._followed.load(*where, strict=strict)
        lines = self._head.load(*where, strict=strict) if self._head is not None else []
        self.load_report = lines if self._writes else []

    def close(self, *, wait: bool) -> None:
        """End the background threads; ``wait`` until nothing more is sent on either way."""
        for end in (self._followed, self._head):
            if end is not None:
                end.relay.close(wait=wait)


class _End:
    """Of a way from a stage to the head before it, one end.

    Args:
        tensors: the layers, or the head's copies of them.
        boundary: the layer between both.
        rule: when copies are taken and used.
        relay: this end's.
    """

    def __init__(self, tensors: list[Tensor], boundary: int, rule: RefreshRule, relay: LateRelay) -> None:
        self.tensors, self.boundary, self.rule, self.relay = tensors, boundary, rule, relay

    def state(self, folder: str, batch: int, checkpoint_engine: Any, *, strict: bool) -> dict[str, Any] | None:
        """What a checkpoint has for a run that resumes at ``batch``, the same at both ends; None: nothing that fits."""
        path = self._path(folder)
        found = checkpoint_engine.load(path, map_location=torch.device("cpu")) if os.path.exists(path) else None
        return completed(found, self.rule.pending(batch), self.tensors, strict=strict, path=path)

    def _path(self, folder: str) -> str:
        return os.path.join(folder, layout.slow_layers(self.boundary))


class _FollowedStage(_End):
    """The end with the layers."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._followed = Followed(on_host(self.tensors), self.rule.average)
        self.relay.send(START, on_host(self.tensors))

    def begin_batch(self, batch: int) -> None:
        if self.rule.takes(batch):
            self.relay.send(batch, self._followed.take(batch, on_host(self.tensors)))
        used = self.rule.used_from(batch)
        if used is not None:
            del self._followed.taken[used]

    def save(self, folder: str, batch: int, checkpoint_engine: Any) -> None:
        state = self._followed.state(self.rule.pending(batch))
        checkpoint_engine.save(state_dict=state, path=self._path(folder))

    def load(self, folder: str, batch: int, checkpoint_engine: Any, *, strict: bool) -> None:
        state = self.state(folder, batch, checkpoint_engine, strict=strict)
        if state is not None:
            self._followed.load(state)
            return
        self._followed.begin_again(on_host(self.tensors), self.rule.pending(batch))
        self.relay.send(START, on_host(self.tensors))


class _FollowingHead(_End):
    """The end with the head."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._taken: dict[int, list[Tensor]] = {}

    def begin(self) -> None:
        """With the layers as they are at the other end."""
        install(self.tensors, self.relay.take(START))

    def begin_batch(self, batch: int) -> None:
        used = self.rule.used_from(batch)
        if used is not None:
            self.collect([used])
            install(self.tensors, self._taken.pop(used))

    def collect(self, batches: Sequence[int]) -> None:
        """Wait for the copies of these batches."""
        for batch in batches:
            if batch not in self._taken:
                self._taken[batch] = self.relay.take(batch)

    def load(self, folder: str, batch: int, checkpoint_engine: Any, *, strict: bool) -> list[str]:
        """The copies that are in use come with the head. Returns lines for the user."""
        state = self.state(folder, batch, checkpoint_engine, strict=strict)
        if state is not None:
            self._taken = state["taken"]
            return []
        now = self.relay.take(START)
        install(self.tensors, now)
        self._taken = dict.fromkeys(self.rule.pending(batch), now)
        return [begun_again(self.boundary)]


class _Tensors:
    """Those of one stage.

    Attributes:
        followed: of its first layers, if the head before them follows them.
        copies: what this stage's head has of the next stage's.
        error: what is wrong with them, for all ranks to raise.
    """

    def __init__(self, module: InterlockedPipelineModule, stage: int, layers: int) -> None:
        self.followed: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.error: str | None = None
        try:
            if stage - 1 in module.placement.heads:
                self.followed = first_layers(stage, module.forward_funcs, layers)
            for objective in module.objectives.values():
                self.copies += objective.copied_layers()
        except InterlockingError as error:
            self.error = str(error)

    def agree(self, group: dist.ProcessGroup, ranks: Sequence[int], heads: Sequence[int]) -> int:
        """Bytes of the largest copy, after all stages have found that layers and copies fit."""
        seen: list[Any] = [None] * group.size()
        dist.all_gather_object(seen, (self.error, shapes(self.followed), shapes(self.copies)), group=group)
        for error, _, _ in seen:
            if error:
                raise ModuleError(error)
        for stage in heads:
            copies, followed = seen[ranks[stage]][2], seen[ranks[stage + 1]][1]
            if copies != followed:
                raise ModuleError(
                    f"the head of stage {stage} copies layers of {copies}, the next stage's are {followed}."
                )
        return max(sum(math.prod(shape) * dtype.itemsize for shape, dtype in seen[ranks[k]][2]) for k in heads)
