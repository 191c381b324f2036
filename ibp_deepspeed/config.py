"""The ``"interlocking"`` block of a DeepSpeed configuration."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ibp_deepspeed.errors import InterlockingError

Mode = Literal["furthest", "window"]


class ConfigError(InterlockingError, ValueError):
    """A configuration that can't be trained with."""


class AuxHeadConfig(BaseModel):
    """Options of the language-model heads that end every stage but the last."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chunk_tokens: int | None = Field(default=None, ge=1)
    """Tokens whose logits exist at once; None picks about 64 MiB of logits."""


class InterlockingConfig(BaseModel):
    """The ``"interlocking"`` block of the DeepSpeed JSON (names: docs/how-it-works.md).

    Use :meth:`parse` for input that a user wrote: it turns pydantic's report into one sentence.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Literal["local", "pairwise", "nwise", "global"] = "pairwise"
    width: int | None = Field(default=None, ge=1)
    mode: Mode = "furthest"
    window_weights: tuple[float, ...] | None = None
    hop_slack: int = Field(default=0, ge=0)
    channel_depth: int | None = Field(default=None, ge=1)
    streaming: bool = True
    clip_scope: Literal["stage", "global"] = "stage"
    aux_head: AuxHeadConfig | None = AuxHeadConfig()

    @model_validator(mode="after")
    def _consistent(self) -> InterlockingConfig:
        fixed = {"local": 1, "pairwise": 2}.get(self.strategy)
        if self.strategy == "nwise" and self.width is None:
            raise ValueError('strategy "nwise" needs a width, for example "width": 3')
        if self.strategy == "global" and self.width is not None:
            raise ValueError(f'strategy "global" takes no width, {self.width} was given')
        if fixed is not None and self.width not in (None, fixed):
            raise ValueError(f'strategy "{self.strategy}" has width {fixed}, not {self.width}: use "nwise"')
        self._check_weights()
        return self

    def _check_weights(self) -> None:
        weights = self.window_weights
        if weights is None:
            return
        if self.mode != "window":
            raise ValueError(f'window_weights are for mode "window", the mode is "{self.mode}"')
        if self.strategy != "global" and len(weights) != self.width_for(len(weights) + 1):
            raise ValueError(
                f"window_weights has {len(weights)} values, the width is {self.width_for(len(weights) + 1)}"
            )
        if not all(math.isfinite(w) and w >= 0 for w in weights) or weights[0] <= 0:
            raise ValueError(f"window_weights must be finite, not negative, the first above 0: {list(weights)}")

    @classmethod
    def parse(cls, block: Mapping[str, Any] | InterlockingConfig | None) -> InterlockingConfig:
        """Validate a user's block.

        Raises:
            ConfigError: one sentence about the first thing that is wrong.
        """
        if isinstance(block, InterlockingConfig):
            return block
        if block is not None and not isinstance(block, Mapping):
            raise ConfigError(f'"interlocking" must be an object, not {block!r}.')
        try:
            return cls.model_validate(dict(block or {}))
        except ValidationError as error:
            raise ConfigError(_sentence(error)) from None

    def width_for(self, stages: int) -> int:
        """The effective width N on ``stages`` stages: 1 … stages (N ≥ K is backpropagation)."""
        named = {"local": 1, "pairwise": 2, "global": stages}
        return min(named.get(self.strategy, self.width or stages), stages)


def nearest(name: str, known: list[str]) -> str:
    """`` (did you mean …?)`` for the known name closest to ``name``, or an empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f' (did you mean "{match[0]}"?)' if match else ""


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in ("interlocking", *first["loc"]))
    if first["type"] == "extra_forbidden":
        fields = AuxHeadConfig.model_fields if len(first["loc"]) > 1 else InterlockingConfig.model_fields
        return f'unknown key "{path}"{nearest(str(first["loc"][-1]), list(fields))}.'
    message = first["msg"].removeprefix("Value error, ")
    return (
        f'"{path}": {message[0].lower()}{message[1:]}, got {first["input"]!r}.'
        if first["loc"]
        else f'"{path}": {message}.'
    )
