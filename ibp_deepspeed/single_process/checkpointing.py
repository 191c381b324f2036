"""How a VirtualPipeline saves and loads: the files that the engine writes for one replica without ZeRO."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.checkpoint.finite import require_finite
from ibp_deepspeed.checkpoint.manifest import PipelineShape, head_structure
from ibp_deepspeed.checkpoint.reader import NAMES_KEY, CheckpointReader, head_name
from ibp_deepspeed.checkpoint.reshape import (
    HeadOrigin,
    decay_report,
    dropped_report,
    fill_head,
    head_origin,
    restore_plain,
    source_of,
)
from ibp_deepspeed.checkpoint.store import CheckpointStore
from ibp_deepspeed.checkpoint.tensor_file import read
from ibp_deepspeed.objectives.late_targets import not_taken
from ibp_deepspeed.objectives.shared_readout import RefreshRule, fill_pending, source_readout
from ibp_deepspeed.objectives.slow_layers import slow_rule
from ibp_deepspeed.optimizer.parameter_groups import PLACEHOLDER
from ibp_deepspeed.single_process.full_precision import FullPrecisionSums


class SingleProcessCheckpoints:
    """The checkpoints of all stages in one process.

    Args:
        reference: the stages, heads and gradients.
        optimizers, schedulers: of each stage.
        micro_batches: M.
        batch_size: samples a batch.

    Attributes:
        bounds: stage k has layers bounds[k] … bounds[k+1]-1.
        load_report: what the last :meth:`load` had to change, for the user; empty if nothing.
    """

    def __init__(
        self,
        reference: FullPrecisionSums,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Any],
        micro_batches: int,
        batch_size: int,
    ) -> None:
        self._reference, self._optimizers, self._schedulers = reference, optimizers, schedulers
        self._micro_batches, self._batch_size = micro_batches, batch_size
        sizes = [len(list(stage.children())) for stage in reference.stages]
        self.bounds = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
        self._store = CheckpointStore()
        self.load_report: list[str] = []

    def save(self, folder: Path, tag: str | None, files: Mapping[str, str]) -> None:
        """Write what the engine writes for one replica without ZeRO, and texts by file name; complete or not at all.

        Raises:
            CheckpointError: it can't be written.
            NonFiniteError: weights are not finite.
        """
        for stage in range(len(self._reference.stages)):
            named = ((name, parameter) for parameter, name in self._names(stage).items())
            require_finite(named, self._reference.batch)
        name = tag or layout.tag_of(self._reference.batch)
        self._store.save(folder, name, self.shape(), self._write, files=files)

    def load(self, folder: Path, tag: str | None) -> None:
        """Read a checkpoint of a VirtualPipeline or of an engine, of any shape.

        Raises:
            CheckpointError: there is none, a file is missing, damaged or doesn't fit.
        """
        path, manifest = self._store.open(folder, tag)
        own = self.shape()
        shape = own.before_decay() if manifest is None else manifest.shape
        saved, same, regrouped = CheckpointReader(path, shape), shape == own, shape.differs_by_decay_alone(own)
        lines = [] if same else self._load_by_name(saved)
        if same:
            self._load_stages(path, saved)
        self.load_report = ([] if regrouped else lines) + dropped_report(shape, own) + decay_report(shape, own)
        counters = saved.stage_file()
        self._reference.batch = counters["global_steps"]
        for scheduler in self._schedulers:
            if scheduler is not None and counters["lr_scheduler"] is not None:
                scheduler.load_state_dict(counters["lr_scheduler"])
        self._load_readouts(path, strict=same or regrouped)
        self._load_late_targets(path, strict=same or regrouped)
        self.load_report += self._load_slow_layers(path, strict=same or regrouped)
        self._store.resume_random_state(path)

    def shape(self) -> PipelineShape:
        """What decides what the files of a checkpoint hold."""
        kind, heads = type(self._optimizers[0]).__name__, self._heads()
        return PipelineShape(
            bounds=self.bounds,
            replicas=1,
            micro_batches=self._micro_batches,
            heads=self._reference.placement.boundaries(self.bounds),
            head_options=head_structure(self._reference.interlocking.aux_head) if heads else None,
            optimizer=f"masters/{kind}" if self._reference.has_masters else kind,
            decay=self._reference.interlocking.decay,
        )

    def _heads(self) -> dict[int, int]:
        """Loss → the layer before which its head stands."""
        placement = self._reference.placement
        return {loss: placement.boundary(loss, self.bounds) for loss in self._reference.aux_heads}

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name, module in self._files():
            torch.save({key: value.cpu() for key, value in module.state_dict().items()}, folder / name)
        for k in range(len(self._reference.stages)):
            torch.save(self._stage_state(k), folder / layout.stage(k))
        if self._rule() is not None:
            assert self._reference.source is not None
            state = {"taken": self._reference.taken, "average": self._reference.source.average}
            torch.save(state, folder / layout.SHARED_READOUT)
        for k, memory in self._reference.late.memories(self._micro_batches).items():
            torch.save(memory.state_dict(self._reference.batch), folder / layout.late_targets(0, k))
        for stage, copies in self._reference.slow_layers.items():
            torch.save(copies.state(self._slow_copies_due()), folder / layout.slow_layers(self._heads()[stage]))

    def _stage_state(self, stage: int) -> dict[str, Any]:
        scheduler, batches = self._schedulers[stage], self._reference.batch
        return {
            "module": None,
            "optimizer": self._optimizers[stage].state_dict(),
            "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
            "masters": [p.detach() for p in self._trained(stage)],
            NAMES_KEY: list(self._names(stage).values()),
            "global_steps": batches,
            "global_samples": batches * self._batch_size,
            "skipped_steps": 0,
            "dp_world_size": 1,
            "mp_world_size": len(self._reference.stages),
        }

    def _layers(self) -> Iterator[tuple[int, nn.Module]]:
        """All pipeline layers by their index."""
        return enumerate(layer for stage in self._reference.stages for layer in stage.children())

    def _files(self) -> Iterator[tuple[str, nn.Module]]:
        for index, layer in self._layers():
            yield layout.layer(index), layer
        for loss, boundary in self._heads().items():
            yield layout.aux_head(boundary), self._reference.aux_heads[loss]

    def _names(self, stage: int) -> dict[nn.Parameter, str]:
        """A stage's trained parameters, in the order of its optimizer, and their names in the model."""
        names = {p: f"{index}.{name}" for index, layer in self._layers() for name, p in layer.named_parameters()}
        for loss, boundary in self._heads().items():
            head = self._reference.aux_heads[loss]
            names.update({p: head_name(boundary, name) for name, p in head.named_parameters()})
        return {p: names.get(p, PLACEHOLDER) for p in self._parameters(stage)}

    def _trained(self, stage: int) -> list[nn.Parameter]:
        """What the optimizer of a stage trains, in its order."""
        return [p for group in self._optimizers[stage].param_groups for p in group["params"]]

    def _parameters(self, stage: int) -> list[nn.Parameter]:
        """The parameters that these are, or of which they are the fp32 copies."""
        copied = zip(self._reference.masters(stage), self._reference.parameters(stage), strict=True)
        parameters = dict(copied)
        return [parameters.get(p, p) for p in self._trained(stage)]

    def _load_stages(self, folder: Path, saved: CheckpointReader) -> None:
        """Files of the same shape."""
        for index, layer in self._layers():
            layer.load_state_dict(read(layout.find_layer(folder, index) or folder / layout.layer(index)))
        for loss, boundary in self._heads().items():
            self._reference.aux_heads[loss].load_state_dict(read(folder / layout.aux_head(boundary)))
        for k, optimizer in enumerate(self._optimizers):
            state = saved.stage_file(k)
            optimizer.load_state_dict(state["optimizer"])
            self._reference.set_masters(self._parameters(k), state.get("masters"))

    def _load_by_name(self, saved: CheckpointReader) -> list[str]:
        """Files of another shape; returns lines for the user."""
        for index, layer in self._layers():
            values = {name: saved.weight(f"{index}.{name}") for name in layer.state_dict()}
            layer.load_state_dict({name: value for name, value in values.items() if value is not None})
        origins: dict[int, HeadOrigin] = {}
        for loss, boundary in self._heads().items():
            objective = self._reference.objectives[loss]
            origins[boundary] = head_origin(objective.module, objective.sources(), boundary, saved)
            fill_head(objective.module, origins[boundary], saved)
        lines: list[str] = []
        for k, optimizer in enumerate(self._optimizers):
            self._reference.set_masters(self._parameters(k), None)
            places = zip(self._names(k).values(), self._trained(k), strict=True)
            sources = {master: source_of(place, origins) for place, master in places if place != PLACEHOLDER}
            named = {master: name for master, name in sources.items() if name}
            lines += [f"stage {k}, {line}" for line in restore_plain(optimizer, named, saved)]
        self._reference.masters_to_weights()
        return [*(origin.words for origin in origins.values()), *lines]

    def _rule(self) -> RefreshRule | None:
        """When copies of the last LM head are made; None if none ever is (private, frozen)."""
        if self._reference.source is None:
            return None
        stages = len(self._reference.stages)
        return RefreshRule.from_config(self._reference.interlocking, stages, self._micro_batches)

    def _load_readouts(self, folder: Path, *, strict: bool) -> None:
        """Copies that are taken and not yet used; unless ``strict`` those that lack are as the newest before them."""
        rule, path = self._rule(), folder / layout.SHARED_READOUT
        if rule is None or self._reference.source is None:
            return
        state: dict[str, Any] = read(path) if strict or path.exists() else {"taken": {}, "average": None}
        if not strict:
            now = source_readout(self._reference.stages[-1])
            fill_pending(state["taken"], rule.pending(self._reference.batch), now)
        self._reference.taken = state["taken"]
        if state["average"] is not None:
            self._reference.source.average = state["average"]

    def _load_late_targets(self, folder: Path, *, strict: bool) -> None:
        """What heads have kept for late targets; unless ``strict`` nothing."""
        for k, memory in self._reference.late.memories(self._micro_batches).items():
            path = folder / layout.late_targets(0, k)
            state = read(path) if strict and path.exists() else {}
            device = next(self._reference.stages[k].parameters()).device
            lacking = memory.load_state_dict(state, self._reference.batch, device)
            self.load_report += [not_taken(k, lacking)] if lacking else []

    def _slow_copies_due(self) -> list[int]:
        """The batches of the copies of layers that are taken and not yet used."""
        rule = slow_rule(self._reference.interlocking, self._micro_batches)
        return [] if rule is None else rule.pending(self._reference.batch)

    def _load_slow_layers(self, folder: Path, *, strict: bool) -> list[str]:
        """Averages, and copies that are taken and not yet used; returns lines for the user."""
        lines, boundaries, due = [], self._heads(), self._slow_copies_due()
        for stage, copies in self._reference.slow_layers.items():
            path = folder / layout.slow_layers(boundaries[stage])
            state = read(path) if path.exists() else None
            lines += copies.load(state, due, strict=strict, boundary=boundaries[stage], path=path)
        return lines
