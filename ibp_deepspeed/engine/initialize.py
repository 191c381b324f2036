"""``initialize``: deepspeed.initialize for interlocked pipelines."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.utils import log_dist
from torch.utils import cpp_extension
from torch.utils.data import IterableDataset

from ibp_deepspeed.comm.distributed import check_compiler, check_connections
from ibp_deepspeed.config.deepspeed import check_ds_config, is_enabled, load_ds_config, resolve_interlocking, zero_stage
from ibp_deepspeed.config.interlocking import AuxHeadConfig, InterlockingConfig, least_refresh_delay
from ibp_deepspeed.config.kinds import parsed_by_deepspeed
from ibp_deepspeed.config.known_keys import unknown_keys
from ibp_deepspeed.engine.engine import InterlockedPipelineEngine
from ibp_deepspeed.errors import ConfigError, DataError, ModuleError
from ibp_deepspeed.objectives.slow_layers import slow_rule
from ibp_deepspeed.optimizer.configured import check_muon, is_muon
from ibp_deepspeed.optimizer.learning_rate import configured_schedule, is_ours
from ibp_deepspeed.optimizer.matrices import muon_groups
from ibp_deepspeed.optimizer.parameter_groups import parameter_groups
from ibp_deepspeed.stage.module import InterlockedPipelineModule
from ibp_deepspeed.strategy.timeline import Timeline


def initialize(
    args: Any = None,
    model: InterlockedPipelineModule | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: str | Path | Mapping[str, Any] | None = None,
) -> tuple[InterlockedPipelineEngine, Any, Any, Any]:
    """As ``deepspeed.initialize``, for an :class:`InterlockedPipelineModule`.

    Args:
        args: namespace with ``deepspeed_config``, unless ``config`` is given.
        model: the module; its ``interlocking`` or the configuration's block decides the strategy.
        optimizer: optimizer or callable, instead of the configuration's.
        model_parameters: what to optimize (default: everything on this stage, in the groups of ``decay``).
        training_data: data set for DeepSpeed's loader.
        lr_scheduler: scheduler or callable, instead of the configuration's.
        dist_init_required: as in DeepSpeed.
        collate_fn: for ``training_data``.
        config: DeepSpeed configuration, a path or a mapping.

    Returns:
        engine, optimizer, data loader, learning-rate scheduler.

    Raises:
        ConfigError: a configuration that can't be trained with.
        ModuleError: a model that can't be trained with this strategy.
        DataError: ``training_data`` without a length.
    """
    if not isinstance(model, InterlockedPipelineModule):
        raise ModuleError(f"initialize needs an InterlockedPipelineModule, not a {type(model).__name__}.")
    if isinstance(training_data, IterableDataset):
        raise DataError(
            "training_data is an IterableDataset, which can't be divided among replicas: make a DataLoader of this "
            "replica's part, and give train_batch its iterator."
        )
    ds_config = load_ds_config(config if config is not None else getattr(args, "deepspeed_config", None))
    interlocking = resolve_interlocking(ds_config, model.interlocking)
    check_ds_config(ds_config)
    check_muon(ds_config)
    check_compiler(ds_config)
    _check_fused_adam(ds_config)
    check_connections(dist.get_backend())
    unknown = unknown_keys(ds_config)
    if unknown:
        log_dist(f"nobody reads {', '.join(unknown)} of the configuration", ranks=[0], level=logging.WARNING)
    grid = model.grid
    mpu = grid if interlocking.clip_scope == "global" else StageGrid(grid)
    without_block = _for_deepspeed(ds_config)
    deepspeed_config = parsed_by_deepspeed(without_block, mpu)
    micro_batches = deepspeed_config.gradient_accumulation_steps
    _check_module(model, Timeline(interlocking, model.num_stages, micro_batches, model.has_aux_heads))
    _configure(model, interlocking, optimizer, model_parameters)
    _find_frozen_stages(model)
    _check_aux_head(interlocking.aux_head, model.num_stages, micro_batches)
    _check_slow_layers(interlocking, micro_batches)
    if model_parameters is not None and optimizer is None and is_muon(ds_config):
        raise ConfigError("Muon has groups of its own: leave model_parameters out, or give an optimizer.")
    if model_parameters is not None or isinstance(optimizer, torch.optim.Optimizer):
        interlocking = interlocking.model_copy(update={"decay": "all"})  # the user's own groups, left as they are
    if model_parameters is None:
        trained = [
            p for p in model.parameters() if p.requires_grad
        ]  # DeepSpeed would take the copies of an LM head too
        if optimizer is None and is_muon(ds_config):
            model_parameters = muon_groups(trained, model.inner_matrices(), interlocking.decay)
        else:
            model_parameters = parameter_groups(trained, interlocking.decay)
        _check_groups(model_parameters, interlocking, ds_config)
    engine = InterlockedPipelineEngine(
        interlocking=interlocking,
        args=None,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=configured_schedule(ds_config) if lr_scheduler is None and is_ours(ds_config) else lr_scheduler,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=without_block,
        config_class=deepspeed_config,
    )
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


class StageGrid(PipelineParallelGrid):
    """DeepSpeed's grid with each stage alone in its "model-parallel" group.

    The optimizers reduce norms and overflow flags over that group, which is the whole pipeline: a
    barrier a batch, and one norm for losses that have nothing to do with each other.
    """

    def __init__(self, grid: PipelineParallelGrid) -> None:
        self.__dict__.update(grid.__dict__)

    def get_model_parallel_group(self) -> Any:
        """Overrides PipelineParallelGrid's: this rank alone (its rank and world size keep naming checkpoints)."""
        return self.slice_proc_group


def _for_deepspeed(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed reads of a configuration, with fp32 sums where it would sum in bf16 unless told otherwise: the
    micro-batches of a batch, and then the replicas."""
    without_block = {key: value for key, value in ds_config.items() if key != "interlocking"}
    if is_enabled(ds_config, "bf16") and zero_stage(ds_config) == 1:
        without_block.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        if without_block["data_types"].get("grad_accum_dtype") == "fp32":
            without_block.setdefault("communication_data_type", "fp32")
        if is_muon(ds_config):  # whose class is DeepSpeed's, which it knows by its name alone
            without_block["zero_allow_untested_optimizer"] = True
    return without_block


def _check_module(model: InterlockedPipelineModule, timeline: Timeline) -> None:
    """Refuse a module that some batch of the training can't be trained with."""
    stages, tied = model.num_stages, model.tied_across_stages()
    narrow = [s.width for s in timeline.strategies() if not s.is_widest]
    if narrow and tied:
        raise ModuleError(
            f"layer {tied[0]!r} is tied across stages, which width {narrow[0]} of {stages} stages can't train: untie "
            f'it, or use strategy "global" throughout.'
        )
    if model.dynamic_shape:
        raise ModuleError("dynamic_shape is not supported, because receives are posted ahead: pad to one shape.")


def _configure(
    model: InterlockedPipelineModule, interlocking: InterlockingConfig, optimizer: Any, model_parameters: Any
) -> None:
    """Let the module know what the configuration says of its heads.

    Raises:
        ModuleError: that moves heads whose parameters somebody has taken already.
    """
    taken = model_parameters is not None or isinstance(optimizer, torch.optim.Optimizer)
    if model.configure(interlocking) and taken:
        raise ModuleError(
            '"interlocking.aux_head.borrow" moves the heads, whose parameters were taken from the module before: give '
            "the interlocking block to InterlockedPipelineModule."
        )


def _find_frozen_stages(model: InterlockedPipelineModule) -> None:
    """Have all stages know which trunks have nothing to train: the schedule sends no gradients to them for nothing.

    Raises:
        ModuleError: nobody has anything to train.
    """
    seen: list[Any] = [None] * dist.get_world_size()
    trains_head = any(p.requires_grad for p in model.aux_head.parameters()) if model.aux_head is not None else False
    dist.all_gather_object(seen, (model.stage_id, bool(model.trunk_parameters()), trains_head))
    if not any(trunk or head for _, trunk, head in seen):
        raise ModuleError("no stage has a parameter to train: leave some layers with requires_grad.")
    model.frozen_stages = tuple(sorted({stage for stage, trunk, _ in seen if not trunk}))
    model.give_optimizer_something()


def _check_fused_adam(ds_config: Mapping[str, Any]) -> None:
    """Refuse DeepSpeed's FusedAdam where it can't be compiled.

    Raises:
        ConfigError: on CUDA without nvcc, unless it was compiled when DeepSpeed was installed.
    """
    block = ds_config.get("optimizer", {})
    if get_accelerator().device_name() != "cuda" or str(block.get("type", "")).lower() not in ("adam", "adamw"):
        return
    if block.get("params", {}).get("torch_adam") or installed_ops.get("fused_adam") or cpp_extension.CUDA_HOME:
        return
    raise ConfigError(
        f"DeepSpeed compiles its {block['type']} with nvcc, which was not found (CUDA_HOME): use torch's own, "
        '"torch_adam": true with "fused": true.'
    )


def _check_groups(groups: list[dict[str, Any]], interlocking: InterlockingConfig, ds_config: Mapping[str, Any]) -> None:
    """Refuse groups of which ZeRO's optimizer would take norms that other stages don't.

    Raises:
        ModuleError: it reduces one norm a group over the pipeline, and a stage has more groups than another.
    """
    if interlocking.clip_scope != "global" or zero_stage(ds_config) != 1:
        return
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, len(groups))
    if len(set(counts)) > 1:
        raise ModuleError(
            'one of the stages has no matrices or nothing else, which ZeRO 1 with "clip_scope": "global" can\'t train '
            'in two groups: use "decay": "all".'
        )


def _check_aux_head(options: AuxHeadConfig | None, stages: int, micro_batches: int) -> None:
    """Warn of an LM head that stages have to wait for."""
    if options is None:
        return
    least = least_refresh_delay(stages, micro_batches)
    if options.readout == "shared" and options.delay(stages, micro_batches) < least:
        log_dist(
            f"refresh_delay {options.refresh_delay} is below {least}: stages will wait for the last one's LM head",
            ranks=[0],
            level=logging.WARNING,
        )


def _check_slow_layers(interlocking: InterlockingConfig, micro_batches: int) -> None:
    """Warn of copies of layers that stages have to wait for."""
    rule, least = slow_rule(interlocking, micro_batches), least_refresh_delay(2, micro_batches)
    if rule is not None and rule.delay < least:
        log_dist(
            f"delay {rule.delay} of objective momentum is below {least}: stages will wait for the next one's layers",
            ranks=[0],
            level=logging.WARNING,
        )
