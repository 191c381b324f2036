"""Interlocking backpropagation for large language models on DeepSpeed's pipeline engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ibp_deepspeed.config import AuxHeadConfig, ConfigError, InterlockingConfig
    from ibp_deepspeed.distributed import init_distributed
    from ibp_deepspeed.engine import InterlockedPipelineEngine
    from ibp_deepspeed.errors import InterlockingError
    from ibp_deepspeed.initialization import initialize
    from ibp_deepspeed.module import InterlockedPipelineModule, ModuleError
    from ibp_deepspeed.reference import InterlockedReference
    from ibp_deepspeed.schedule import InterlockedTrainSchedule
    from ibp_deepspeed.strategy import Strategy

__version__ = "0.1.0"

_HOMES = {
    "AuxHeadConfig": "config",
    "ConfigError": "config",
    "InterlockedPipelineEngine": "engine",
    "InterlockedPipelineModule": "module",
    "InterlockedReference": "reference",
    "InterlockedTrainSchedule": "schedule",
    "InterlockingConfig": "config",
    "InterlockingError": "errors",
    "ModuleError": "module",
    "Strategy": "strategy",
    "VirtualPipeline": "virtual",
    "init_distributed": "distributed",
    "initialize": "initialization",
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
