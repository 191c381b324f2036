"""How the engine saves and loads: through DeepSpeed's files where their shape is its own, by name where it is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ibp_deepspeed.checkpoint import layout, reshape
from ibp_deepspeed.checkpoint.finite import require_finite
from ibp_deepspeed.checkpoint.manifest import PipelineShape, head_structure
from ibp_deepspeed.checkpoint.reader import NAMES_KEY, CheckpointReader, names_of
from ibp_deepspeed.checkpoint.store import CheckpointStore
from ibp_deepspeed.checkpoint.tensor_file import load
from ibp_deepspeed.engine.moment import locate
from ibp_deepspeed.engine.optimizer_step import SteppingEngine
from ibp_deepspeed.errors import CheckpointError
from ibp_deepspeed.optimizer.parameter_groups import PLACEHOLDER
from ibp_deepspeed.running_statistics import RunningStatistics
from ibp_deepspeed.stage.late_parts import LatePart

if TYPE_CHECKING:
    from ibp_deepspeed.engine.engine import InterlockedPipelineEngine

_NOT_THE_CLIENTS = ("module", "optimizer", "lr_scheduler", NAMES_KEY)  # DeepSpeed returns the rest as client's state


@dataclass(frozen=True)
class Wanted:
    """What of a checkpoint is to be loaded, by DeepSpeed's names.

    Attributes:
        strict: refuse layers with other parameters than the checkpoint's.
        optimizer: the optimizer's states, its groups' settings and fp32 copies of weights.
        lr_scheduler: how far the rate's schedule is.
        all_but_weights: counters, random states and copies of an LM head on their way, too.
    """

    strict: bool = True
    optimizer: bool = True
    lr_scheduler: bool = True
    all_but_weights: bool = True


Loaded = tuple[str | None, Any]
"""What DeepSpeed's ``load_checkpoint`` returns: a path and the client's state."""


class EngineCheckpoints:
    """The checkpoints of an engine. Beside DeepSpeed's files they have random states and a manifest.

    Args:
        engine: whose they are.
        late: what the stage has from later ones, some of which may be on its way.

    Attributes:
        load_report: what the last :meth:`load` had to change, for the user; empty if nothing.
    """

    def __init__(self, engine: InterlockedPipelineEngine, late: Sequence[LatePart]) -> None:
        self._engine, self._late = engine, late
        self._store = CheckpointStore(dist.get_rank(), dist.get_world_size(), dist.barrier)
        self.load_report: list[str] = []

    def save(
        self,
        write: Callable[[Path, Mapping[str, Any]], None],
        folder: Path,
        tag: str | None,
        client_state: Mapping[str, Any],
        *,
        files: Mapping[str, str],
        latest: bool,
    ) -> None:
        """See :meth:`CheckpointingEngine.save_checkpoint`; ``write`` is DeepSpeed's part of it."""
        names = self._parameter_names()
        weights = dict(self._engine.module.named_parameters())
        require_finite(((place, weights[name]) for name, place in names.items()), self._engine.global_steps)
        state = {**client_state, NAMES_KEY: list(names.values())}
        name = tag or layout.tag_of(self._engine.global_steps)
        try:
            self._store.save(folder, name, self.shape(), lambda made: write(made, state), files=files, latest=latest)
        except Exception as error:
            locate(error, f"stage {self._engine.stage_id}, saving {name}")
            raise

    def load(self, read: Callable[[Path], Loaded], folder: Path, tag: str | None, wanted: Wanted) -> Loaded:
        """See :meth:`CheckpointingEngine.load_checkpoint`; ``read`` is DeepSpeed's part of it."""
        for part in self._late:
            part.settle(self._engine.global_steps)
        path, manifest = self._store.open(folder, tag)
        own = self.shape()
        saved = own.before_decay() if manifest is None else manifest.shape
        same, regrouped = saved == own, saved.differs_by_decay_alone(own)
        if same and (manifest is None or not self._loads_by_name_only()):
            self.load_report = []
            found, client_state = read(path)
        else:
            lines, client_state = self._load_by_name(path, saved, wanted)
            self.load_report, found = [] if same or regrouped else lines, str(path / "reshaped")
            if self._engine.global_rank == 0:
                self.load_report += reshape.dropped_report(saved, own) + reshape.decay_report(saved, own)
        if found is not None:
            if wanted.all_but_weights:
                self._store.resume_random_state(path)
            steps, checkpoint_engine = self._engine.global_steps, self._engine.checkpoint_engine
            strict = wanted.all_but_weights and (same or regrouped)
            for part in self._late:
                part.load(str(path), steps, checkpoint_engine, strict=strict)
                self.load_report += part.load_report
        return found, client_state

    def shape(self) -> PipelineShape:
        """What decides what the files of a checkpoint hold."""
        engine, module = self._engine, self._engine.module
        inner = getattr(engine.optimizer, "optimizer", None) if self._is_partitioned() else None
        classes = [type(part).__name__ for part in (engine.optimizer, inner) if part is not None]
        return PipelineShape(
            bounds=list(module.parts),
            replicas=engine.grid.data_parallel_size,
            micro_batches=engine.micro_batches,
            heads=module.placement.boundaries(module.parts),
            head_options=head_structure(engine.interlocking.aux_head) if module.placement.heads else None,
            optimizer="/".join(classes),
            decay=engine.interlocking.decay,
        )

    def _parameter_names(self) -> dict[str, str]:
        """Of this rank's trained parameters: name in its module → name in the model, in the optimizer's order."""
        engine, module = self._engine, self._engine.module
        places = names_of(module, module.head_boundary)
        if engine.optimizer is None or self._is_partitioned():
            return {name: places[name] for name, p in module.named_parameters() if p.requires_grad}
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        ordered = [names[id(p)] for group in engine.optimizer.param_groups for p in group["params"]]
        return {name: places[name] for name in ordered}

    def _loads_by_name_only(self) -> bool:
        """bf16 without ZeRO: BF16_Optimizer wants the states of all replicas, DeepSpeed 0.19.8 hands it one."""
        return self._is_partitioned() and not self._engine.zero_optimization()

    def _load_by_name(self, path: Path, shape: PipelineShape, wanted: Wanted) -> tuple[list[str], dict[str, Any]]:
        """A checkpoint of another shape; returns lines for the user, and the client's state."""
        engine, module = self._engine, self._engine.module
        saved = CheckpointReader(path, shape)
        module.load_trunk(str(path), engine.checkpoint_engine, wanted.strict)
        boundary, origins = module.head_boundary, {}
        if boundary is not None:
            objective = module.objectives[module.losses[0]]
            origins[boundary] = reshape.head_origin(objective.module, objective.sources(), boundary, saved)
            reshape.fill_head(objective.module, origins[boundary], saved)
        places = names_of(module, boundary)
        own = [(name, p) for name, p in module.named_parameters() if p.requires_grad and name != PLACEHOLDER]
        trained = {p: reshape.source_of(places[name], origins) for name, p in own}
        sources = {parameter: name for parameter, name in trained.items() if name is not None}
        lines = [origin.words for origin in origins.values()]
        lines += [f"stage {engine.stage_id}, {line}" for line in self._restore_optimizer(sources, saved, wanted)]
        counters = saved.stage_file()
        if wanted.lr_scheduler and engine.lr_scheduler is not None and counters.get("lr_scheduler") is not None:
            engine.lr_scheduler.load_state_dict(counters["lr_scheduler"])
        if wanted.all_but_weights:
            for name in ("global_steps", "global_samples", "skipped_steps"):
                setattr(engine, name, counters[name])
        first = engine.grid.get_data_parallel_rank() == 0
        client_state = {key: value for key, value in counters.items() if key not in _NOT_THE_CLIENTS}
        return lines if first else [], client_state

    def _restore_optimizer(
        self, sources: Mapping[nn.Parameter, str], saved: CheckpointReader, wanted: Wanted
    ) -> list[str]:
        """States of parameters (name in the checkpoint by parameter), or none of them; returns lines for the user."""
        optimizer = self._engine.optimizer
        if optimizer is None:
            return []
        if wanted.optimizer:
            restore = reshape.restore_partitioned if self._is_partitioned() else reshape.restore_plain
            return restore(optimizer, sources, saved)
        if self._is_partitioned():
            optimizer.refresh_fp32_params()  # fp32 copies are the weights that were loaded
        return []

    def _is_partitioned(self) -> bool:
        """Whether DeepSpeed keeps flat copies of parameters, as ZeRO and its bf16 optimizer do."""
        return any(hasattr(parameter, "_hp_mapping") for parameter in self._engine.module.parameters())


class CheckpointingEngine(SteppingEngine):
    """An engine with these checkpoints in the place of DeepSpeed's."""

    _checkpoints: EngineCheckpoints
    _statistics: RunningStatistics

    def _configure_checkpointing(self) -> None:
        """Overrides DeepSpeedEngine's: its checkpoint engines read with torch.load, the usual one all that a pickle can
        be."""
        super()._configure_checkpointing()
        self.checkpoint_engine.load = load

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Overrides DeepSpeedEngine's, on all ranks together: a kill at any moment leaves the one before complete.

        Args:
            save_dir: folder of all checkpoints.
            tag: name of this one (default ``global_step<batches>``); one of that name is replaced.
            client_state, save_latest, exclude_frozen_parameters: as in DeepSpeed.
            files: texts to write into it, by file name, which may have a folder before it.

        Raises:
            CheckpointError: it can't be written; ``latest`` still names the one before.
            NonFiniteError: weights are not finite; likewise.
        """
        save = super().save_checkpoint
        self._statistics.average(self.grid.get_data_parallel_group())

        def write(made: Path, state: Mapping[str, Any]) -> None:
            save(str(made.parent), made.name, state, False, exclude_frozen_parameters)

        name = None if tag is None else str(tag)
        state = client_state or {}
        self._checkpoints.save(write, Path(save_dir), name, state, files=files or {}, latest=save_latest)

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> Loaded:
        """Overrides DeepSpeedEngine's: checks the files, and loads a checkpoint of another shape too.

        Args:
            load_dir: folder of all checkpoints.
            tag: name of one (default: the newest).
            load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only: as in DeepSpeed, also
                for another shape. Random states come back unless the weights alone are loaded, if there are as many
                ranks as when they were saved.
            custom_load_fn: not supported.

        Raises:
            CheckpointError: there is none, a file is missing, damaged or doesn't fit; or ``custom_load_fn`` was given.
        """
        if custom_load_fn is not None:
            raise CheckpointError("custom_load_fn can't load a pipeline, whose layers have a file each: leave it out.")
        options = (load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only)
        load = super().load_checkpoint

        def read(path: Path) -> Loaded:
            loaded: Loaded = load(str(path.parent), path.name, *options)
            return loaded

        more = not load_module_only
        wanted = Wanted(load_module_strict, load_optimizer_states and more, load_lr_scheduler_states and more, more)
        return self._checkpoints.load(read, Path(load_dir), None if tag is None else str(tag), wanted)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """torch's own, which DeepSpeed's may be around; none without a parameter to train."""
        if self.optimizer is None:
            return []
        inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        return [inner]

    @property
    def schedulers(self) -> list[Any]:
        """Of the learning rate."""
        return [] if self.lr_scheduler is None else [self.lr_scheduler]

    @property
    def load_report(self) -> list[str]:
        """What this rank's last :meth:`load_checkpoint` had to change, for the user; empty if nothing."""
        return self._checkpoints.load_report
