"""Keys that DeepSpeed 0.19.8 or this package reads: DeepSpeed accepts any other in silence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from ibp_deepspeed.config.interlocking import nearest

# What DeepSpeedConfig asks of its dictionary (a test listens to it and compares), and what its engine asks later.
TOP_LEVEL = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "amp",
        "autotuning",
        "bf16",
        "bfloat16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "compression_training",
        "csv_monitor",
        "curriculum_learning",
        "data_efficiency",
        "data_types",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "eigenvalue",
        "elasticity",
        "expert_parallel",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "graph_harvesting",
        "hybrid_engine",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "nebula",
        "optimizer",
        "pipeline",
        "prescale_gradients",
        "progressive_layer_drop",
        "quantize_training",
        "scheduler",
        "seq_parallel_communication_data_type",
        "sparse_attention",
        "sparse_gradients",
        "steps_per_print",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)

_PIPELINE = (
    "stages partition seed_layers activation_checkpoint_interval pipe_partitioned grad_partitioned use_reentrant"
)


def _fields(model: Any) -> set[str]:
    return set(model.model_fields) | {f.alias for f in model.model_fields.values() if f.alias}


NESTED: dict[str, set[str]] = {
    "optimizer": {"type", "params", "legacy_fusion"},
    "scheduler": {"type", "params"},
    "pipeline": set(_PIPELINE.split()),
    "data_types": {"grad_accum_dtype", "param_dtype", "buffer_dtype"},
    "bf16": _fields(DeepSpeedBF16Config),
    "zero_optimization": _fields(DeepSpeedZeroConfig),
    "tensorboard": _fields(TensorBoardConfig),
    "csv_monitor": _fields(CSVConfig),
    "wandb": _fields(WandbConfig),
}


def unknown_keys(ds_config: Mapping[str, Any]) -> list[str]:
    """Keys nobody reads, each with the nearest known one; ``interlocking`` is checked by its own model."""
    found = _unknown("", ds_config, TOP_LEVEL | {"interlocking"})
    for block, known in NESTED.items():
        if isinstance(ds_config.get(block), Mapping):
            found += _unknown(f"{block}.", ds_config[block], known)
    return found


def _unknown(prefix: str, block: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    names = sorted(known)
    return [f'"{prefix}{key}"{nearest(key, names)}' for key in block if key not in names]
