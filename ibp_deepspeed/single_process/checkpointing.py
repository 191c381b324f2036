"""How a VirtualPipeline saves and loads: the files that the engine writes for one replica without ZeRO."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ibp_deepspeed.checkpoint import store
from ibp_deepspeed.checkpoint.manifest import Contents, Shape, structure
from ibp_deepspeed.checkpoint.reader import NAMES_KEY, SavedStates, head_name, read
from ibp_deepspeed.checkpoint.reshape import HeadOrigin, fill_head, head_origin, restore_plain, source_of
from ibp_deepspeed.objectives.shared_readout import RefreshRule, fill_pending, source_readout
from ibp_deepspeed.stage.module import aux_head_path, shared_readout_path


class VirtualCheckpoints:
    """The part of a VirtualPipeline that reads and writes files.

    Attributes:
        load_report: what the last :meth:`load_checkpoint` had to change, for the user; empty if nothing.
    """

    bounds: list[int]
    stages: int
    reference: Any
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[Any]
    load_report: list[str] = []
    _micro_batches: int
    _borrow: int

    @property
    @abstractmethod
    def global_steps(self) -> int:
        """Batches trained."""

    @abstractmethod
    def train_batch_size(self) -> int:
        """Samples a batch."""

    def save_checkpoint(
        self, save_dir: str | Path, tag: str | None = None, files: Mapping[str, str] | None = None
    ) -> None:
        """Write what the engine writes for one replica without ZeRO, and texts by file name; whole or not at all."""
        name = tag or f"global_step{self.global_steps}"
        made = Path(save_dir) / store.partial(name)
        with store.written(Path(save_dir) / name):
            store.clear(Path(save_dir), name)
            self._write(made, files or {})
            Contents.write(made, self.checkpoint_shape())
            store.publish(Path(save_dir), name)

    def load_checkpoint(self, load_dir: str | Path, tag: str | None = None) -> None:
        """Read a checkpoint of a VirtualPipeline or of an engine, of any shape.

        Raises:
            CheckpointError: there is none, a file is missing, damaged or doesn't fit.
        """
        store.restore(Path(load_dir))
        folder = Path(load_dir) / (tag or store.newest_tag(Path(load_dir)))
        contents = store.check(folder)
        shape = self.checkpoint_shape() if contents is None else contents.shape
        saved, same = SavedStates(folder, shape), shape == self.checkpoint_shape()
        self.load_report = []
        if same:
            self._load_stages(folder, saved)
        else:
            self._load_reshaped(saved)
        counters = saved.stage_file()
        self.reference.batch = counters["global_steps"]
        for scheduler in self.schedulers:
            if scheduler is not None and counters["lr_scheduler"] is not None:
                scheduler.load_state_dict(counters["lr_scheduler"])
        self._load_readouts(folder, strict=same)
        store.load_random_state(folder, 0, 1)

    def checkpoint_shape(self) -> Shape:
        """The shape that decides what the files hold."""
        options = self.reference.config.aux_head
        kind = type(self.optimizers[0]).__name__
        boundaries = self._head_boundaries()
        return Shape(
            bounds=self.bounds,
            replicas=1,
            micro_batches=self._micro_batches,
            heads={boundary: k + bool(self._borrow) for k, boundary in enumerate(boundaries)},
            head_options=structure(options) if boundaries else None,
            optimizer=f"masters/{kind}" if self.reference.has_masters else kind,
        )

    def _head_boundaries(self) -> list[int]:
        """The layers before which the heads stand."""
        return [self.bounds[k + 1] + self._borrow for k in range(len(self.reference.aux_heads))]

    def _write(self, folder: Path, files: Mapping[str, str]) -> None:
        folder.mkdir(parents=True)
        for name, module in self._files():
            torch.save({key: value.cpu() for key, value in module.state_dict().items()}, folder / name)
        for k in range(self.stages):
            torch.save(self._stage_state(k), folder / f"mp_rank_{k:02d}_model_states.pt")
        if self._rule() is not None:
            state = {"taken": self.reference.taken, "average": self.reference.source.average}
            torch.save(state, shared_readout_path(str(folder)))
        store.save_random_state(folder, 0)
        store.write_texts(folder, files)

    def _stage_state(self, stage: int) -> dict[str, Any]:
        scheduler = self.schedulers[stage]
        return {
            "module": None,
            "optimizer": self.optimizers[stage].state_dict(),
            "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
            "masters": [p.detach() for p in self.reference.masters(stage)],
            NAMES_KEY: list(self._names(stage).values()),
            "global_steps": self.global_steps,
            "global_samples": self.global_steps * self.train_batch_size(),
            "skipped_steps": 0,
            "dp_world_size": 1,
            "mp_world_size": self.stages,
        }

    def _files(self) -> Iterator[tuple[str, nn.Module]]:
        for k, stage in enumerate(self.reference.stages):
            for index, layer in enumerate(stage.children(), self.bounds[k]):
                yield f"layer_{index:02d}-model_states.pt", layer
        for boundary, head in zip(self._head_boundaries(), self.reference.aux_heads, strict=True):
            yield os.path.basename(aux_head_path("", boundary)), head

    def _names(self, stage: int) -> dict[nn.Parameter, str]:
        """A stage's trained parameters, in the order of its optimizer, and their names in the model."""
        layers = enumerate(self.reference.stages[stage].children(), self.bounds[stage])
        names = {p: f"{index}.{name}" for index, layer in layers for name, p in layer.named_parameters()}
        for boundary, head in zip(self._head_boundaries(), self.reference.aux_heads, strict=True):
            names.update({p: head_name(boundary, name) for name, p in head.named_parameters()})
        return {p: names[p] for p in self.reference.parameters(stage)}

    def _load_stages(self, folder: Path, saved: SavedStates) -> None:
        """Files of the same shape."""
        for name, module in self._files():
            found = sorted(folder.glob(name.replace("-model", "-*model"))) or [folder / name]
            module.load_state_dict(read(found[0]))
        for k in range(self.stages):
            state = saved.stage_file(k)
            self.optimizers[k].load_state_dict(state["optimizer"])
            self.reference.set_masters(k, state.get("masters"))

    def _load_reshaped(self, saved: SavedStates) -> None:
        """Files of another shape, by name."""
        for k, stage in enumerate(self.reference.stages):
            for index, layer in enumerate(stage.children(), self.bounds[k]):
                values = {name: saved.weight(f"{index}.{name}") for name in layer.state_dict()}
                layer.load_state_dict({name: value for name, value in values.items() if value is not None})
        origins: dict[int, HeadOrigin] = {}
        for boundary, head in zip(self._head_boundaries(), self.reference.aux_heads, strict=True):
            origins[boundary] = head_origin(head, boundary, saved)
            fill_head(head, origins[boundary], saved)
        self.load_report = [origin.words for origin in origins.values()]
        for k in range(self.stages):
            self.reference.set_masters(k, None)
            places = zip(self._names(k).values(), self.reference.masters(k), strict=True)
            sources = {master: source_of(place, origins) for place, master in places}
            restore_plain(self.optimizers[k], {master: name for master, name in sources.items() if name}, saved)
        self.reference.masters_to_weights()

    def _rule(self) -> RefreshRule | None:
        """When copies of the last readout are made; None if none ever is (private, frozen)."""
        if self.reference.source is None:
            return None
        return RefreshRule.from_config(self.reference.config, self.stages, self._micro_batches)

    def _load_readouts(self, folder: Path, *, strict: bool) -> None:
        """Copies that are taken and not yet used; unless ``strict`` those that lack are as the newest before them."""
        rule, path = self._rule(), Path(shared_readout_path(str(folder)))
        if rule is None:
            return
        state: dict[str, Any] = read(path) if strict or path.exists() else {"taken": {}, "average": None}
        if not strict:
            now = source_readout(self.reference.stages[-1])
            fill_pending(state["taken"], rule.pending(self.global_steps), now)
        self.reference.taken = state["taken"]
        if state["average"] is not None:
            self.reference.source.average = state["average"]
