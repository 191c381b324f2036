"""The parts of the acceptance: which there are, and how long each may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from ibp_deepspeed.errors import ConfigError

SHAPES = ("gpt2-124m", "llama3-1b", "llama2-7b", "llama3-8b")
"""Of ``ibp_deepspeed/models/configs``."""


class NotRun(Exception):
    """A part that can't be run on this machine; its message says why, and nothing has failed."""


@dataclass(frozen=True)
class Part:
    """One process of the acceptance.

    Attributes:
        family: module of ``benchmarks.gpu``, and the table that the rows go into.
        limit: seconds on a machine with a GPU, after which it is ended.
        arguments: of the module's ``run``.
    """

    family: str
    limit: float
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> ModuleType:
        """Its code."""
        return import_module(f"benchmarks.gpu.{self.family}")


def all_parts(small: bool) -> dict[str, Part]:
    """Name → part, in the order in which they run: what is most likely to be wrong comes first."""
    parts = {"environment": Part("environment", 60)}
    parts |= {f"sharing-{k}": Part("sharing", 90, {"stages": k}) for k in (2, 4)}
    parts |= {f"nccl-{k}": Part("nccl", 60, {"stages": k}) for k in (2, 3, 4, 8)}
    parts |= {
        f"profile-{shape}": Part("stages", 75, {"shape": shape}) for shape in (("llama-tiny",) if small else SHAPES)
    }
    return parts | {"heads": Part("heads", 60), "study": Part("study", 150)}


def chosen(parts: dict[str, Part], words: Sequence[str]) -> dict[str, Part]:
    """The parts of these names or beginnings of names (``sharing``: all of them).

    Raises:
        ConfigError: a word that none begins with.
    """
    unknown = [word for word in words if not any(name.startswith(word) for name in parts)]
    if unknown:
        raise ConfigError(f"there is no part {unknown[0]}: there are {', '.join(parts)}.")
    return {name: part for name, part in parts.items() if any(name.startswith(word) for word in words)}
