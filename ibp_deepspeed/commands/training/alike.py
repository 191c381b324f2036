"""What all hosts of a job have to have alike, as one process finds it."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ibp_deepspeed.commands.training.training_plan import TrainingPlan

_CODE = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "deepspeed", "transformers")
_OF_ONE_HOST = (
    "local_rank",
    "verbose",
    "data",
    "mixture",
    "output",
    "deepspeed_config",
    "model",
    "init_from",
    "partition",
)
"""Options that may differ: paths, whose contents are compared where they decide what is computed."""


def alike(plan: TrainingPlan, args: argparse.Namespace) -> dict[str, str]:
    """Name in words → value; what is long is a digest. Weights of ``--init-from`` are not read for it."""
    about, options = plan.description, {key: str(value) for key, value in vars(args).items() if key not in _OF_ONE_HOST}
    return {
        **{f"--{name.replace('_', '-')}": value for name, value in options.items()},
        "Python's version": platform.python_version(),
        **{f"{name}'s version": version(name) for name in _PACKAGES},
        "ibp_deepspeed's code": digest(*(path.read_bytes() for path in _sources())),
        "the data": plan.data_digest(args),
        "the DeepSpeed configuration": _digest_of(about.settings, about.interlocking),
        "the model's configuration": _digest_of(about.model),
        "what is trained of it": "" if about.tuning is None else about.tuning.model_dump_json(),
        "layers of the stages": str(plan.bounds),
        "the checkpoint to resume from": str(plan.resume),
    }


def _sources() -> list[Path]:
    return sorted(_CODE.rglob("*.py"))


def _digest_of(*values: Any) -> str:
    return digest(json.dumps(values, sort_keys=True, default=str).encode())


def digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:12]
