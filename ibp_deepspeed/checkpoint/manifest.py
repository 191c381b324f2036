"""The manifest of a checkpoint: its files' sizes, and the shape of the pipeline that wrote it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.config.objectives import WITH_PARAMETERS, MomentumOptions
from ibp_deepspeed.errors import CheckpointError, first_line
from ibp_deepspeed.folders import relative_name
from ibp_deepspeed.json_text import small_text


def rising(bounds: list[int]) -> list[int]:
    """The same bounds of stages, the first one 0, each above the one before.

    Raises:
        ValueError: they are not; in words.
    """
    if len(bounds) < 2 or bounds[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
        raise ValueError("the bounds of the stages have to rise from 0")
    return bounds


Bounds = Annotated[list[int], AfterValidator(rising)]


class PipelineShape(BaseModel):
    """How a model, its heads and the optimizer's state are spread over processes: what their files hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bounds: Bounds
    """Stage k has layers bounds[k] … bounds[k+1]-1."""
    replicas: PositiveInt
    """Data-parallel ranks."""
    micro_batches: PositiveInt
    """M."""
    heads: dict[int, int]
    """The layer before which a head stands → the stage that holds it."""
    head_options: dict[str, Any] | None
    optimizer: str
    """How the optimizer's state is laid out, and its class."""
    decay: Literal["matrices", "all"] = "all"
    """Its parameter groups; checkpoints of before have one."""

    @model_validator(mode="after")
    def _has_its_heads(self) -> PipelineShape:
        if any(not 0 <= stage < self.stages for stage in self.heads.values()):
            raise ValueError(f"it has a head on a stage that is not one of its {self.stages}")
        return self

    def before_decay(self) -> PipelineShape:
        """The shape of a checkpoint that says nothing of its own, for a pipeline of this one."""
        return self.model_copy(update={"decay": "all"})

    def differs_by_decay_alone(self, other: PipelineShape) -> bool:
        """Whether nothing but the parameter groups tells them apart."""
        return self != other and self.model_copy(update={"decay": other.decay}) == other

    @property
    def stages(self) -> int:
        """K."""
        return len(self.bounds) - 1


def head_structure(options: AuxHeadConfig | None) -> dict[str, Any] | None:
    """The options that decide what parameters a head has, and where it stands."""
    if options is None:
        return None
    structure = options.model_dump(mode="json", include={"readout", "blocks", "rank", "borrow"})
    has_more = isinstance(options.objective, WITH_PARAMETERS)  # else nothing is said, as before there were others
    copied = {"layers": options.objective.layers} if isinstance(options.objective, MomentumOptions) else {}
    return structure | ({"objective": options.objective.name} if has_more else {}) | copied


class CheckpointManifest(BaseModel):
    """What is in a checkpoint's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: PipelineShape
    files: dict[Annotated[str, AfterValidator(relative_name)], NonNegativeInt]
    """Path in the folder → bytes."""

    @classmethod
    def write(cls, folder: Path, shape: PipelineShape) -> None:
        """List a complete folder in itself."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != layout.MANIFEST]
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
        text = json.dumps(cls(shape=shape, files=files).model_dump(mode="json"), indent=1)
        (folder / layout.MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> CheckpointManifest | None:
        """The list, or None in a folder of an earlier version.

        Raises:
            CheckpointError: it is damaged.
        """
        path = folder / layout.MANIFEST
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(small_text(path))
        except ValidationError as error:
            raise CheckpointError(f"{path} is damaged: {error.errors()[0]['msg']}.") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} can't be read: {first_line(error)}.") from error

    def check(self, folder: Path) -> None:
        """Compare the files with the list.

        Raises:
            CheckpointError: one is missing, a link, or has another size.
        """
        for name, size in self.files.items():
            path = folder / name
            if path.is_symlink():
                raise CheckpointError(f"{folder} is damaged: {name} is a symbolic link, which is not followed.")
            if not path.exists():
                raise CheckpointError(f"{folder} is damaged: {name} is missing.")
            if path.stat().st_size != size:
                raise CheckpointError(
                    f"{folder} is damaged: {name} has {path.stat().st_size:,} bytes, it was written with {size:,}."
                )
