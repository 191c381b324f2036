"""Interlocking backpropagation for large language models on DeepSpeed's pipeline engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ibp_deepspeed.comm.distributed import init_distributed
    from ibp_deepspeed.config.interlocking import AuxHeadConfig, ConfigError, InterlockingConfig
    from ibp_deepspeed.engine.engine import InterlockedPipelineEngine
    from ibp_deepspeed.engine.initialize import initialize
    from ibp_deepspeed.errors import InterlockingError
    from ibp_deepspeed.schedule.generator import InterlockedTrainSchedule
    from ibp_deepspeed.single_process.reference import InterlockedReference
    from ibp_deepspeed.single_process.virtual_pipeline import VirtualPipeline
    from ibp_deepspeed.stage.module import InterlockedPipelineModule, ModuleError
    from ibp_deepspeed.strategy.strategy import Strategy

__version__ = "0.1.0"

_HOMES = {
    "AuxHeadConfig": "config.interlocking",
    "ConfigError": "errors",
    "InterlockedPipelineEngine": "engine.engine",
    "InterlockedPipelineModule": "stage.module",
    "InterlockedReference": "single_process.reference",
    "InterlockedTrainSchedule": "schedule.generator",
    "InterlockingConfig": "config.interlocking",
    "InterlockingError": "errors",
    "ModuleError": "errors",
    "Strategy": "strategy.strategy",
    "VirtualPipeline": "single_process.virtual_pipeline",
    "init_distributed": "comm.distributed",
    "initialize": "engine.initialize",
}

__all__ = [
    "AuxHeadConfig",
    "ConfigError",
    "InterlockedPipelineEngine",
    "InterlockedPipelineModule",
    "InterlockedReference",
    "InterlockedTrainSchedule",
    "InterlockingConfig",
    "InterlockingError",
    "ModuleError",
    "Strategy",
    "VirtualPipeline",
    "init_distributed",
    "initialize",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: DeepSpeed takes seconds, and preparing data needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
