"""The objectives of a stage of a language model, by name: each reads out next tokens as the model itself does."""

from __future__ import annotations

from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.layers import AuxiliaryHead
from ibp_deepspeed.objectives.distillation import Distillation
from ibp_deepspeed.objectives.head import ExitLayers, Objective
from ibp_deepspeed.objectives.label_smoothing import LabelSmoothing
from ibp_deepspeed.objectives.local_critic import LocalCritic
from ibp_deepspeed.objectives.momentum import Momentum
from ibp_deepspeed.objectives.reconstruction import Reconstruction
from ibp_deepspeed.objectives.similarity import PredSim
from ibp_deepspeed.objectives.stochastic_layerwise import StochasticLayerwise


class LanguageModelObjective(Objective):
    """Cross-entropy behind a head that is made of layers of the model's kinds, and so can be exported as some."""

    module: AuxiliaryHead

    @property
    def inner_layers(self) -> int:
        """Decoder blocks in the head."""
        return len(self.module.kinds)

    def as_layers(self) -> ExitLayers:
        """Its blocks are decoder layers, its norm and LM head the model's last layer."""
        head = self.module
        return ExitLayers(head.kinds, [*(block.state_dict() for block in head.blocks), head.as_last_layer()])


class PredSimObjective(PredSim, LanguageModelObjective):
    """With similarity matching."""


class ReconstructingObjective(Reconstruction, LanguageModelObjective):
    """With reconstruction of the input."""


class MomentumObjective(Momentum, LanguageModelObjective):
    """Behind slow copies of the next stage's first layers."""

    def as_layers(self) -> ExitLayers:
        """Overrides LanguageModelObjective's.

        Raises:
            ModelError: always; no layer of a model adds a linear map of its input to its output.
        """
        raise ModelError(
            "a head of objective momentum adds a linear map to its copied layers, which no layer of the model does, so "
            "that its exit is no smaller model: export the last exit, or one with another objective."
        )


class SmoothedObjective(LabelSmoothing, LanguageModelObjective):
    """With soft targets."""


class DistilledObjective(Distillation, LanguageModelObjective):
    """With what the next exit predicted."""


class CriticObjective(LocalCritic, LanguageModelObjective):
    """As a critic."""


class StochasticLayerwiseObjective(StochasticLayerwise, LanguageModelObjective):
    """With posteriors of a random projection."""


def of_name(name: str) -> type[LanguageModelObjective]:
    """The class of one of ``config.objectives.OBJECTIVES``."""
    return {kind.name: kind for kind in _KINDS}[name]


_KINDS = (
    LanguageModelObjective,
    SmoothedObjective,
    PredSimObjective,
    ReconstructingObjective,
    DistilledObjective,
    CriticObjective,
    StochasticLayerwiseObjective,
    MomentumObjective,
)
