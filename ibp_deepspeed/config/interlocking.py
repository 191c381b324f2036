"""The ``"interlocking"`` block of a DeepSpeed configuration."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ibp_deepspeed.config.objectives import (
    LATE,
    CrossEntropyOptions,
    MomentumOptions,
    ObjectiveOptions,
    check_heads,
    objective_options,
)
from ibp_deepspeed.errors import ConfigError

Mode = Literal["furthest", "window", "sum"]


class AuxHeadConfig(BaseModel):
    """Options of the language-model heads of all exits but the last."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    readout: Literal["private", "shared", "frozen"] = "private"
    """``private``: the head's own, trained by its loss; ``shared``: a read-only copy of the last stage's, which the
    last loss alone trains, refreshed as below; ``frozen``: a copy of the last stage's as it was at the start."""
    blocks: int = Field(default=0, ge=0)
    """Decoder blocks of the model's own kind, in the head alone, before its norm and LM head."""
    borrow: int = Field(default=0, ge=0)
    """q: the head of stage k stands behind the first q layers of stage k+1, and is computed there: their forward pass
    is needed anyway, and serves as the head's blocks. Every stage but the first needs more than q layers."""
    refresh_interval: int = Field(default=10, ge=1)
    """R: the last stage's LM head is copied as it stands when batch r·R begins, r = 1, 2, …"""
    refresh_delay: int | None = Field(default=None, ge=0)
    """Every head uses that copy from batch r·R + delay on; None: max(R, ⌈K/M⌉ + 1)."""
    average: float | None = Field(default=None, gt=0, lt=1)
    """β: heads use the exponential average copy ← β·copy + (1-β)·newest; None uses the newest as it is."""
    rank: int | None = Field(default=None, ge=1)
    """A private LM head H → V as H → rank → V."""
    aux_tokens: float = Field(default=1.0, gt=0, le=1)
    """Fraction of the positions whose loss trains the heads and, through them, the trunks; the last stage uses all."""
    aux_tokens_seed: int = 0
    """Of the draw of these positions, which is another one for each batch and stage, the same on all replicas; and of
    all that negatives and objectives draw."""
    negatives: int | None = Field(default=None, ge=1)
    """S: in training the heads' losses are over the label and S tokens drawn from the vocabulary, weighted so that they
    stand for all of it; None: the whole vocabulary. The last stage's loss and evaluations are exact."""
    negatives_by: Literal["frequency", "uniform"] = "frequency"
    """How likely a token is drawn: as often as it occurs in the training data, or all alike."""
    chunk_tokens: int | None = Field(default=None, ge=1)
    """Tokens whose logits exist at once; None picks about 64 MiB of logits."""
    objective: ObjectiveOptions = CrossEntropyOptions()
    """What trains the heads and, through them, the trunks: a name, or an object of ``name`` and its options
    (docs/objectives.md). The last stage's loss and evaluations are cross-entropy."""

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, value: Any) -> Any:
        return objective_options(value)

    @model_validator(mode="after")
    def _consistent(self) -> AuxHeadConfig:
        given = self.model_fields_set & {"refresh_interval", "refresh_delay", "average"}
        if given and self.readout != "shared":
            raise ValueError(f'{min(given)} is for readout "shared", the readout is "{self.readout}"')
        if self.rank is not None and self.readout != "private":
            raise ValueError(f'rank is for readout "private", the readout is "{self.readout}"')
        if self.rank is not None and self.negatives is not None:
            raise ValueError("rank and negatives don't go together: rows of a product are no cheaper to read")
        if self.negatives is not None and self.objective.name == "label_smoothing":
            raise ValueError("negatives and label_smoothing don't go together: soft targets are of all tokens")
        if self.borrow and self.objective.name == "stochastic_layerwise":
            raise ValueError(
                "borrow and stochastic_layerwise don't go together: a head behind borrowed layers is not on the stage "
                "whose input it compares"
            )
        if "negatives_by" in self.model_fields_set and self.negatives is None:
            raise ValueError("negatives_by is for negatives, of which no number is given")
        self._check_late_targets()
        if isinstance(self.objective, MomentumOptions):
            self._check_momentum()
        return self

    def _check_late_targets(self) -> None:
        if not isinstance(self.objective, LATE):
            return
        name = self.objective.name
        if self.blocks or self.borrow:
            key = "blocks" if self.blocks else "borrow"
            raise ValueError(
                f"{key} and {name} don't go together: it keeps some positions of a row, layers need all of them"
            )
        if self.negatives is not None:
            raise ValueError(f"negatives and {name} don't go together: what the next exit says is of all tokens")
        if self.readout != "private" and name == "local_critic":
            raise ValueError(
                f'local_critic is for readout "private", of "{self.readout}" it could train the norm alone'
            )

    def _check_momentum(self) -> None:
        if self.blocks:
            raise ValueError(
                f"blocks = {self.blocks} and objective momentum don't go together: copied layers are the head's "
                'blocks, "layers" of the objective is their number'
            )
        if self.borrow:
            raise ValueError(
                f"borrow = {self.borrow} and objective momentum don't go together: a head is behind the next stage's "
                "layers, or has copies of them"
            )

    def delay(self, stages: int, micro_batches: int) -> int:
        """Batches between a copy of the last stage's LM head and its use, on K stages with M micro-batches."""
        if self.refresh_delay is not None:
            return self.refresh_delay
        return max(self.refresh_interval, least_refresh_delay(stages, micro_batches))


def least_refresh_delay(stages: int, micro_batches: int) -> int:
    """⌈K/M⌉ + 1: the first stage runs up to ⌈(K-1)/M⌉ batches ahead, so it would wait for a younger LM head."""
    return -(-stages // micro_batches) + 1


class Phase(BaseModel):
    """From batch ``from_step`` on (counted from 0), another width."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    from_step: int = Field(ge=0)
    width: int = Field(ge=1)
    """N; K or more is backpropagation (in mode furthest)."""
    mode: Mode | None = None
    """None: the configuration's mode."""
    exit_weights: tuple[float, ...] | None = None
    """In mode sum; None: the configuration's."""


class MixedConfig(BaseModel):
    """A part of every batch's micro-batches at another, larger width; batches at N ≥ K stay as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(ge=1)
    fraction: float = Field(gt=0, le=1)
    """Of the micro-batches, rounded up. They come first, so that their gradients travel while the others compute."""
    mode: Mode | None = None
    """None: the configuration's mode."""


class InterlockingConfig(BaseModel):
    """The ``"interlocking"`` block of the DeepSpeed JSON (names: docs/how-it-works.md).

    Use :meth:`parse` for input that a user wrote: it turns pydantic's report into one sentence.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Literal["local", "pairwise", "nwise", "global"] = "pairwise"
    width: int | None = Field(default=None, ge=1)
    mode: Mode = "furthest"
    exits: Literal["every"] | int | tuple[int, ...] = "every"
    """The stages that have a loss: all of them, every G-th counted from the last one (modules of G stages), or these
    and the last one."""
    window_weights: tuple[float, ...] | None = None
    exit_weights: tuple[float, ...] | None = None
    """In mode sum, a weight for each exit, the last one's too; None: all alike, summing to 1."""
    hop_slack: int = Field(default=0, ge=0)
    channel_depth: int | None = Field(default=None, ge=1)
    streaming: bool = True
    clip_scope: Literal["stage", "global"] = "stage"
    backward: Literal["fused", "split"] = "split"
    """``split``: an update whose input gradient goes to the stage before computes and sends that first (B), and its
    weight gradients later (W), which fill the time in which the stage would wait; ``fused``: both together. With
    ``compile`` it is fused."""
    decay: Literal["matrices", "all"] = "matrices"
    """What the optimizer's weight decay acts on: ``matrices`` leaves out norms, biases and temperatures."""
    non_finite: Literal["stop", "skip_batch"] = "stop"
    """What a stage does whose loss or gradients are not finite: end the training, or leave this one step out."""
    watchdog_seconds: float = Field(default=600.0, ge=0, allow_inf_nan=False)
    """A step of the schedule that takes longer ends the job, and names who was waited for; 0: no limit."""
    compile: bool = False
    """``torch.compile`` of the decoder layers."""
    cosine_interval: int = Field(default=100, ge=0)
    """Every so many batches a stage compares its own loss's gradient at its output with those that it receives, for its
    reports; 0: never."""
    schedule: tuple[Phase, ...] = ()
    global_interval: int | None = Field(default=None, ge=2)
    mixed: MixedConfig | None = None
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
        if self.compile and self.backward == "split" and "backward" in self.model_fields_set:
            raise ValueError('backward "split" does not go together with compile, whose layers compute B and W in one')
        self._check_weights()
        self._check_exit_weights()
        self._check_schedule()
        return self

    @field_validator("exits", mode="before")
    @classmethod
    def _exits(cls, value: Any) -> Any:
        if value == "every":
            return value
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        stages = list(value) if isinstance(value, list | tuple) else []
        numbers = all(isinstance(k, int) and not isinstance(k, bool) and k >= 0 for k in stages)
        if stages and numbers and len(set(stages)) == len(stages):
            return tuple(sorted(stages))
        raise ValueError('exits are "every", a number of stages from 1 on, or different stages from 0 on')

    def _check_schedule(self) -> None:
        starts = [phase.from_step for phase in self.schedule]
        if any(a >= b for a, b in zip(starts, starts[1:], strict=False)):
            raise ValueError(f"the from_step values of schedule must rise, they are {starts}")
        if self._starts_with_a_phase() and self.model_fields_set & {"strategy", "width"}:
            raise ValueError(
                "schedule starts at step 0, so strategy and width are never used: leave them out, or let it start later"
            )
        if self.window_weights is not None and (self.schedule or self.mixed):
            raise ValueError("window_weights are for one width: they don't go together with schedule or mixed")
        if self.window_weights is not None and self.aux_head is not None and self.aux_head.borrow:
            raise ValueError(
                "window_weights don't go together with aux_head.borrow, whose layers have weights of their own"
            )

    def _starts_with_a_phase(self) -> bool:
        return bool(self.schedule) and self.schedule[0].from_step == 0

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

    def _check_exit_weights(self) -> None:
        if self.mode == "sum" and self.strategy in ("local", "pairwise") and not self._starts_with_a_phase():
            raise ValueError(f'mode "sum" is for strategy "global", the strategy is "{self.strategy}"')
        modes = [self.mode, *(phase.mode for phase in self.schedule), self.mixed and self.mixed.mode]
        if "sum" in modes and self.aux_head is not None and self.aux_head.borrow:
            raise ValueError('mode "sum" does not go together with aux_head.borrow')
        for mode, weights in ((self.mode, self.exit_weights), *((p.mode, p.exit_weights) for p in self.schedule)):
            if weights is None:
                continue
            if (mode or self.mode) != "sum":
                raise ValueError(f'exit_weights are for mode "sum", the mode is "{mode or self.mode}"')
            if not all(math.isfinite(w) and w >= 0 for w in weights) or weights[-1:] <= (0.0,):
                raise ValueError(f"exit_weights must be finite, not negative, the last above 0: {list(weights)}")

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

    @property
    def splits_backward(self) -> bool:
        """Whether input gradients come first; not with compiled layers, whose backward pass is one piece."""
        return self.backward == "split" and not self.compile

    def exits_for(self, stages: int) -> tuple[int, ...]:
        """The stages of ``stages`` that have a loss, rising; the last one always has.

        Raises:
            ConfigError: one that there is not, or none where the heads' objective can be used.
        """
        if self.exits == "every":
            found = tuple(range(stages))
        elif isinstance(self.exits, int):
            found = tuple(sorted(range(stages - 1, -1, -self.exits)))
        elif self.exits[-1] >= stages:
            raise ConfigError(
                f'"interlocking.exits" names stage {self.exits[-1]}, the {stages} stages are 0 … {stages - 1}.'
            )
        else:
            found = tuple(sorted({*self.exits, stages - 1}))
        if self.aux_head is not None:
            check_heads(self.aux_head.objective, found[:-1])
        return found


def nearest(name: str, known: list[str]) -> str:
    """`` (did you mean …?)`` for the known name closest to ``name``, or an empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f' (did you mean "{match[0]}"?)' if match else ""


def _sentence(error: ValidationError) -> str:
    # A misspelt key is the reason why another one is missing.
    first = min(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
    path = ".".join(str(part) for part in ("interlocking", *first["loc"]))
    if first["type"] == "extra_forbidden":
        nested: dict[str, type[BaseModel]] = {"aux_head": AuxHeadConfig, "schedule": Phase, "mixed": MixedConfig}
        kind = nested[str(first["loc"][0])] if len(first["loc"]) > 1 else InterlockingConfig
        fields = kind.model_fields
        return f'unknown key "{path}"{nearest(str(first["loc"][-1]), list(fields))}.'
    message = first["msg"].removeprefix("Value error, ")
    return (
        f'"{path}": {message[0].lower()}{message[1:]}, got {first["input"]!r}.'
        if first["loc"]
        else f'"{path}": {message}.'
    )
