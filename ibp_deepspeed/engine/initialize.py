"""``initialize``: deepspeed.initialize for interlocked pipelines."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.utils import log_dist

from ibp_deepspeed.comm.distributed import check_compiler, check_connections
from ibp_deepspeed.config.interlocking import AuxHeadConfig, ConfigError, InterlockingConfig, least_refresh_delay
from ibp_deepspeed.config.known_keys import unknown_keys
from ibp_deepspeed.engine.engine import InterlockedPipelineEngine
from ibp_deepspeed.stage.module import InterlockedPipelineModule, ModuleError
from ibp_deepspeed.strategy.timeline import Course


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
        model_parameters: what to optimize (default: everything on this stage).
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
    """
    if not isinstance(model, InterlockedPipelineModule):
        raise ModuleError(f"initialize needs an InterlockedPipelineModule, not a {type(model).__name__}.")
    settings = load_config(config if config is not None else getattr(args, "deepspeed_config", None))
    interlocking = resolve_interlocking(settings, model)
    check_deepspeed_settings(settings)
    check_compiler(settings)
    check_connections(dist.get_backend())
    unknown = unknown_keys(settings)
    if unknown:
        log_dist(f"nobody reads {', '.join(unknown)} of the configuration", ranks=[0], level=logging.WARNING)
    grid = model.mpu()
    mpu = grid if interlocking.clip_scope == "global" else StageGrid(grid)
    without_block = {key: value for key, value in settings.items() if key != "interlocking"}
    if _enabled(settings, "bf16") and _zero_stage(settings) == 1:
        # DeepSpeed would sum the micro-batches of a batch in bf16
        without_block.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    deepspeed_config = DeepSpeedConfig(without_block, mpu)
    micro_batches = deepspeed_config.gradient_accumulation_steps
    options = interlocking.aux_head
    _check_module(model, Course(interlocking, model.num_stages, micro_batches), options.borrow if options else 0)
    _check_aux_head(options, model.num_stages, micro_batches)
    trained = [p for p in model.parameters() if p.requires_grad]  # DeepSpeed would take copied readouts too
    engine = InterlockedPipelineEngine(
        interlocking=interlocking,
        args=None,
        model=model,
        optimizer=optimizer,
        model_parameters=trained if model_parameters is None else model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=without_block,
        config_class=deepspeed_config,
    )
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


class StageGrid(PipelineParallelGrid):
    """DeepSpeed's grid with each stage alone in its "model-parallel" group.

    The optimizers reduce norms and overflow flags over that group, which in a pipeline is the whole pipeline: a
    barrier a batch, and one norm for losses that have nothing to do with each other.
    """

    def __init__(self, grid: PipelineParallelGrid) -> None:
        self.__dict__.update(grid.__dict__)

    def get_model_parallel_group(self) -> Any:
        """Overrides PipelineParallelGrid's: this rank alone (its rank and world size keep naming checkpoints)."""
        return self.slice_proc_group


def load_config(config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Raises:
        ConfigError: there is none, or it is no JSON object.
    """
    if config is None:
        raise ConfigError("no DeepSpeed configuration was given: use --deepspeed_config FILE or config=….")
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read the configuration {path}: {error.strerror}.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is no JSON: {error.msg} in line {error.lineno}.") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(settings).__name__}.")
    return settings


def resolve_interlocking(
    settings: Mapping[str, Any], model: InterlockedPipelineModule | None = None
) -> InterlockingConfig:
    """The block of the configuration or of the module; both, and different, is an error."""
    block = settings.get("interlocking")
    given = model.interlocking if model is not None else None
    if block is None:
        return given or InterlockingConfig()
    parsed = InterlockingConfig.parse(block)
    if given is not None and given != parsed:
        raise ConfigError(
            f"the module's interlocking {given.model_dump(exclude_unset=True)} differs from the configuration's "
            f"{parsed.model_dump(exclude_unset=True)}: give one of them."
        )
    return parsed


def check_deepspeed_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what does not combine with interlocking.

    Raises:
        ConfigError: fp16, torch_autocast, ZeRO 2 or 3, offloading.
    """
    if _enabled(settings, "fp16"):
        raise ConfigError(
            'fp16 is not supported, because every stage would need a loss scale of its own: use "bf16": '
            '{"enabled": true} or fp32.'
        )
    if _enabled(settings, "torch_autocast"):
        raise ConfigError('torch_autocast is not supported: use "bf16": {"enabled": true} or fp32.')
    zero, stage = settings.get("zero_optimization", {}), _zero_stage(settings)
    if stage not in (0, 1):
        raise ConfigError(f"ZeRO stage {stage} does not work with pipelines: use stage 0 or 1.")
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(zero, Mapping) and zero.get(key):
            raise ConfigError(f"zero_optimization.{key} is not supported with pipelines of losses: remove it.")


def _zero_stage(settings: Mapping[str, Any]) -> Any:
    zero = settings.get("zero_optimization", {})
    return zero.get("stage", 0) if isinstance(zero, Mapping) else 0


def _enabled(settings: Mapping[str, Any], key: str) -> bool:
    block = settings.get(key, {})
    return bool(block.get("enabled", False)) if isinstance(block, Mapping) else bool(block)


def _check_module(model: InterlockedPipelineModule, course: Course, borrow: int = 0) -> None:
    """Refuse a module that some batch of the training can't be trained with."""
    stages, tied = model.num_stages, model.tied_across_stages()
    headed = [s for s in course.strategies() if not s.is_backpropagation]
    if headed and not model.has_aux_heads:
        raise ModuleError(
            f"width {headed[0].width} of {stages} stages in mode {headed[0].mode} needs a head for every stage: give "
            f'aux_head, or use strategy "global" in mode "furthest" throughout.'
        )
    narrow = [s.width for s in course.strategies() if s.width < stages]
    if narrow and tied:
        raise ModuleError(
            f"layer {tied[0]!r} is tied across stages, which width {narrow[0]} of {stages} stages can't train: untie "
            f'it, or use strategy "global" throughout.'
        )
    if model.has_aux_heads and borrow != model.borrow:
        raise ModuleError(
            f'"interlocking.aux_head.borrow" is {borrow}, which decides where heads are built: give the block to '
            "InterlockedPipelineModule too."
        )
    if model.dynamic_shape:
        raise ModuleError("dynamic_shape is not supported, because receives are posted ahead: pad to one shape.")


def _check_aux_head(options: AuxHeadConfig | None, stages: int, micro_batches: int) -> None:
    """Warn of a readout that stages have to wait for."""
    if options is None:
        return
    least = least_refresh_delay(stages, micro_batches)
    if options.readout == "shared" and options.delay(stages, micro_batches) < least:
        log_dist(
            f"refresh_delay {options.refresh_delay} is below {least}: stages will wait for the last one's readout",
            ranks=[0],
            level=logging.WARNING,
        )
