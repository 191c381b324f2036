"""Interlocking backpropagation for large language models on DeepSpeed's pipeline engine."""

from ibp_deepspeed.config import AuxHeadConfig, ConfigError, InterlockingConfig
from ibp_deepspeed.distributed import init_distributed
from ibp_deepspeed.engine import InterlockedPipelineEngine
from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.initialize import initialize
from ibp_deepspeed.module import InterlockedPipelineModule, ModuleError
from ibp_deepspeed.reference import InterlockedReference
from ibp_deepspeed.schedule import InterlockedTrainSchedule
from ibp_deepspeed.strategy import Strategy

__version__ = "0.1.0"

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
    "init_distributed",
    "initialize",
]
