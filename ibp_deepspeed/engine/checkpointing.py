"""How the engine saves and loads: through DeepSpeed's files where their shape is its own, by name where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ibp_deepspeed.checkpoint import reshape
from ibp_deepspeed.checkpoint.manifest import Shape, structure
from ibp_deepspeed.checkpoint.reader import NAMES_KEY, SavedStates, names_of
from ibp_deepspeed.checkpoint.store import WholeCheckpoints
from ibp_deepspeed.comm.stage_links import Boundaries
from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.stage.module import InterlockedPipelineModule
from ibp_deepspeed.stage.readout_copies import StageReadout

_NOT_THE_CLIENTS = ("module", "optimizer", "lr_scheduler", NAMES_KEY)  # DeepSpeed returns the rest as client's state


class EngineCheckpoints(WholeCheckpoints):
    """Before PipelineEngine among the engine's base classes."""

    module: InterlockedPipelineModule
    interlocking: InterlockingConfig
    boundaries: Boundaries
    micro_batches: int
    optimizer: Any
    lr_scheduler: Any
    grid: Any
    checkpoint_engine: Any
    _readout: StageReadout | None
    _curr_ckpt_path: str

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> None:
        """Overrides PipelineEngine's to flush first, as a checkpoint is a synchronisation anyway; readouts that were
        taken and not yet used are saved too."""
        self.boundaries.flush(None)
        super().module_state_dict(exclude_frozen_parameters)  # type: ignore[misc]
        if self._readout is not None:
            self._readout.save(self._curr_ckpt_path, self.global_steps, self.checkpoint_engine)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Overrides DeepSpeedEngine's: readouts that were taken and not yet used come back too."""
        if self._readout is not None:
            self._readout.settle(self.global_steps)
        path, client_state = super().load_checkpoint(*args, **kwargs)
        if self._readout is not None and path is not None:
            folder = str(Path(path).parent)
            same = self.loaded_shape in (None, self.checkpoint_shape())
            self._readout.load(folder, self.global_steps, self.checkpoint_engine, strict=same)
        return path, client_state

    def checkpoint_shape(self) -> Shape:
        """See the base class."""
        module = self.module
        inner = getattr(self.optimizer, "optimizer", None) if self._is_partitioned() else None
        classes = [type(part).__name__ for part in (self.optimizer, inner) if part is not None]
        return Shape(
            bounds=list(module.parts),
            replicas=self.grid.data_parallel_size,
            micro_batches=self.micro_batches,
            heads=module.head_places(),
            head_options=structure(self.interlocking.aux_head) if module.has_aux_heads else None,
            optimizer="/".join(classes),
        )

    def stage_names(self) -> dict[str, str]:
        """See the base class."""
        places = names_of(self.module, self.module.head_boundary)
        if self.optimizer is None or self._is_partitioned():
            return {name: places[name] for name, p in self.module.named_parameters() if p.requires_grad}
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        ordered = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        return {name: places[name] for name in ordered}

    def loads_by_name(self) -> bool:
        """bf16 without ZeRO: BF16_Optimizer wants the states of all replicas, DeepSpeed 0.19.8 hands it one."""
        return self._is_partitioned() and not self.zero_optimization()  # type: ignore[attr-defined]

    def load_reshaped(self, folder: Path, shape: Shape) -> tuple[list[str], dict[str, Any]]:
        """See the base class."""
        saved, module = SavedStates(folder, shape), self.module
        module.load_trunk(str(folder), self.checkpoint_engine)
        boundary, heads = module.head_boundary, {}
        if module.aux_head is not None:
            heads[boundary] = reshape.head_origin(module.aux_head, boundary, saved)
            reshape.fill_head(module.aux_head, heads[boundary], saved)
        places = names_of(module, boundary)
        trained = {p: reshape.source_of(places[n], heads) for n, p in module.named_parameters() if p.requires_grad}
        sources = {parameter: name for parameter, name in trained.items() if name is not None}
        if self.optimizer is not None:
            restore = reshape.restore_partitioned if self._is_partitioned() else reshape.restore_plain
            restore(self.optimizer, sources, saved)
        counters = saved.stage_file()
        if self.lr_scheduler is not None and counters.get("lr_scheduler") is not None:
            self.lr_scheduler.load_state_dict(counters["lr_scheduler"])
        self.global_steps = counters["global_steps"]
        self.global_samples = counters["global_samples"]
        self.skipped_steps = counters["skipped_steps"]
        first = self.grid.get_data_parallel_rank() == 0
        client_state = {key: value for key, value in counters.items() if key not in _NOT_THE_CLIENTS}
        return [origin.words for origin in heads.values()] if first else [], client_state

    def _is_partitioned(self) -> bool:
        """Whether DeepSpeed keeps flat copies of parameters, as ZeRO and its bf16 optimizer do."""
        return any(hasattr(parameter, "_hp_mapping") for parameter in self.module.parameters())
