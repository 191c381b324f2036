"""The objectives that ``"interlocking.aux_head.objective"`` can name, each with its options (docs/objectives.md)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ibp_deepspeed.errors import ConfigError


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CrossEntropyOptions(_Options):
    """Next tokens' cross-entropy."""

    name: Literal["cross_entropy"] = "cross_entropy"


class LabelSmoothingOptions(_Options):
    """Cross-entropy with soft targets."""

    name: Literal["label_smoothing"] = "label_smoothing"
    smoothing: float = Field(default=0.1, gt=0, lt=1)
    """ε: a target is 1 - ε at the label, and ε spread evenly over the vocabulary."""


class PredSimOptions(_Options):
    """Prediction, and similarity matching of the hidden states."""

    name: Literal["predsim"] = "predsim"
    beta: float = Field(default=0.99, gt=0, lt=1)
    """β: of the similarity matching; the prediction has 1 - β."""
    tokens: int = Field(default=256, ge=2)
    """Most tokens of a micro-batch that are compared with each other, another draw for each micro-batch and stage."""


class ReconstructionOptions(_Options):
    """Prediction, and reconstruction of the input."""

    name: Literal["reconstruction"] = "reconstruction"
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """λ of the reconstruction at the model's first layer; it falls to 0 at the last, in proportion to depth."""


class DistillationOptions(_Options):
    """Prediction, and some batches later what the next exit predicted."""

    name: Literal["distillation"] = "distillation"
    weight: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """λ of the divergence from the next exit's prediction; cross-entropy has 1."""
    top: int = Field(default=32, ge=1)
    """The likeliest tokens of the next exit that are told apart; all others count as one."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """τ: both exits' logits are divided by it, and the divergence is multiplied by τ²."""
    tokens: int = Field(default=256, ge=1)
    """Most positions of a micro-batch that the next exit's prediction is taken at, another draw for each batch."""
    delay: int | None = Field(default=None, ge=1)
    """Batches between a forward pass and the divergence; None: the least that no stage waits for."""

    @property
    def position_bytes(self) -> int:
        """That travel for a position: tokens of int32, ln of their probabilities and of all others' sum in fp32."""
        return 8 * self.top + 4


class LocalCriticOptions(_Options):
    """Heads that estimate the next exit's loss."""

    name: Literal["local_critic"] = "local_critic"
    tokens: int = Field(default=256, ge=1)
    """Most positions of a micro-batch that the next exit's loss is taken at, another draw for each batch."""
    delay: int | None = Field(default=None, ge=1)
    """Batches between a forward pass and the critic's loss; None: the least that no stage waits for."""

    @property
    def position_bytes(self) -> int:
        """That travel for a position: a loss in fp32."""
        return 4


class MomentumOptions(_Options):
    """Next tokens' cross-entropy behind slow copies of the next stage's first layers."""

    name: Literal["momentum"] = "momentum"
    layers: int = Field(default=1, ge=1)
    """q: so many of the next stage's layers, its first ones, are copied."""
    average: float = Field(default=0.95, gt=0, lt=1)
    """β: what is copied is their exponential average ← β·average + (1-β)·newest, a step for each copy."""
    interval: int = Field(default=10, ge=1)
    """R: a copy is taken as batch r·R begins on the next stage, r = 1, 2, …"""
    delay: int | None = Field(default=None, ge=0)
    """The head uses that copy from batch r·R + delay on; None: ⌈2/M⌉ + 1, the least that is not waited for."""


class StochasticLayerwiseOptions(_Options):
    """Prediction, and predictions of the stage's output that are like those of its input."""

    name: Literal["stochastic_layerwise"] = "stochastic_layerwise"
    categories: int = Field(default=256, ge=2)
    """d: rows of the random projection whose softmax is a posterior."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """The part of the projection's columns that is left out, another draw for each micro-batch and stage."""


ObjectiveOptions = (
    CrossEntropyOptions
    | LabelSmoothingOptions
    | PredSimOptions
    | ReconstructionOptions
    | DistillationOptions
    | LocalCriticOptions
    | StochasticLayerwiseOptions
    | MomentumOptions
)

_KINDS = (
    CrossEntropyOptions,
    LabelSmoothingOptions,
    PredSimOptions,
    ReconstructionOptions,
    DistillationOptions,
    LocalCriticOptions,
    StochasticLayerwiseOptions,
    MomentumOptions,
)
OBJECTIVES: dict[str, type[ObjectiveOptions]] = {kind.model_fields["name"].default: kind for kind in _KINDS}
"""By name."""
LATE = (DistillationOptions, LocalCriticOptions)
"""Those with late targets."""
WITH_PARAMETERS = (PredSimOptions, ReconstructionOptions, MomentumOptions)
"""Those whose heads have parameters beside those of the LM head."""


def objective_options(value: Any) -> ObjectiveOptions:
    """What a configuration says: a name, or an object of ``name`` and options.

    Raises:
        ValueError: an unknown name or option, with those that there are, or a value that an option can't have.
    """
    if isinstance(value, ObjectiveOptions):
        return value
    given = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = given.get("name")
    if not isinstance(name, str) or name not in OBJECTIVES:
        close = difflib.get_close_matches(str(name), list(OBJECTIVES), n=1, cutoff=0.5)
        meant = f' (did you mean "{close[0]}"?)' if close else ""
        raise ValueError(f"there is no objective {name!r:.60}{meant}, there are {', '.join(OBJECTIVES)}")
    kind = OBJECTIVES[name]
    known = [option for option in kind.model_fields if option != "name"]
    for option in given.keys() - kind.model_fields.keys():
        has = f"has {', '.join(known)}" if known else "has none"
        raise ValueError(f"{option!r:.60} is no option of {name}, which {has}")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]} of {name}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def check_heads(objective: ObjectiveOptions, stages: Sequence[int]) -> None:
    """That an objective says something of the stages that have a head.

    Raises:
        ConfigError: it compares hidden states that stages are given, and the first stage is the only one.
    """
    if isinstance(objective, StochasticLayerwiseOptions) and list(stages) == [0]:
        raise ConfigError(
            f'"interlocking.aux_head.objective" {objective.name} compares what a stage is given with what it makes of '
            "it, but only the first stage has a head, and it is given data: use more stages or exits, or another "
            "objective."
        )
