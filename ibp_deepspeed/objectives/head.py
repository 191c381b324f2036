"""The contract of a head and its objective: what engine, one-process pipeline, reference, exits and export ask of it.

An objective is one object: a module on h_k, what it returns, its loss, the part of the positions that the loss takes,
what it needs from elsewhere, and how it is exported. Nothing outside knows its kind. A plain ``nn.Module`` given as
``aux_head`` is the simple case: its objective is the pipeline's ``loss_fn`` on what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from torch import Tensor, nn

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.objectives.evaluation import weight_of
from ibp_deepspeed.objectives.late_targets import LateTargets
from ibp_deepspeed.objectives.sampled_softmax import NegativeSample
from ibp_deepspeed.objectives.shared_readout import head_readout
from ibp_deepspeed.objectives.slow_layers import head_copies
from ibp_deepspeed.objectives.token_sampling import TokenSample

__all__ = ["ExitLayers", "LossFn", "Needs", "Objective", "as_objective", "last_objective"]

LossFn = Callable[[Any, Any], Tensor]
"""(outputs, labels) → a scalar, the mean over whatever counts."""


@dataclass(frozen=True)
class Needs:
    """What an objective takes from elsewhere.

    Attributes:
        readout: whether its module has a copy of the last stage's LM head, kept up to date or as it was at the start.
        borrow: layers of the next stage before its module, which then stands there.
        late: what it wants to know of the next exit, some batches later, for :meth:`Objective.late_loss`.
        layers: so many of the next stage's layers, its first ones, of which its module has slow copies.
    """

    readout: Literal["shared", "frozen"] | None = None
    borrow: int = 0
    late: LateTargets | None = None
    layers: int = 0


@dataclass(frozen=True)
class ExitLayers:
    """A head as layers of the model, for the export of its exit as a smaller model.

    Attributes:
        kinds: for each block of the head, the decoder layer of the model that it is of the kind of.
        states: state dicts of these blocks as pipeline layers, then that of the last layer (norm and LM head).
    """

    kinds: Sequence[int]
    states: Sequence[Mapping[str, Tensor]]


class Objective:
    """What a stage's loss is made of. Subclass it to change any part.

    Args:
        module: a_k, applied to h_k (with borrowed layers to what they give).
        loss_fn: its loss; None: the pipeline's.
        late: see :class:`Needs`.

    Attributes:
        name: that ``"aux_head.objective"`` asks for it by.
        needs: from elsewhere.
        positions: those that the loss takes in training; None: all. Evaluations take all.
        negatives: what stands for the vocabulary in training; None: all of it. Evaluations take all.
        token_counts: how often each token occurs in the training data, [V], for negatives; None: unknown.
    """

    name = "cross_entropy"

    def __init__(self, module: nn.Module, loss_fn: LossFn | None = None, *, late: LateTargets | None = None) -> None:
        self.module, self.loss_fn = module, loss_fn
        self.needs = Needs(late=late)
        self.positions: TokenSample | None = None
        self.negatives: NegativeSample | None = None
        self.token_counts: Tensor | None = None

    def configured(self, options: AuxHeadConfig | None, loss_fn: LossFn | None) -> Self:
        """Take over what the configuration says, and the pipeline's loss where the objective has none of its own.

        Called by whoever builds a pipeline, before anything else; again if the configuration changes.

        Raises:
            InterlockingError: it asks for another objective than this one.
        """
        self.loss_fn = self.loss_fn or loss_fn
        if options is not None:
            if options.objective.name not in (self.name, Objective.name):
                raise InterlockingError(
                    f'"aux_head.objective" is {options.objective.name}, for heads of cut language models: a head given '
                    f"as {type(self).__name__} has a loss of its own, leave the key out."
                )
            readout = None if options.readout == "private" else options.readout
            self.needs = Needs(readout, options.borrow, self.needs.late)
            self.positions = TokenSample.from_options(options)
            self.negatives = NegativeSample.from_options(options, self.token_counts)
        return self

    def outputs(self, hidden: Any) -> Any:
        """What the loss takes: a tensor, or :class:`~ibp_deepspeed.objectives.cross_entropy.LazyLogits`."""
        return self.module(hidden)

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """A scalar, with its graph."""
        return outputs if self.loss_fn is None else self.loss_fn(outputs, labels)

    def training_loss(self, outputs: Any, labels: Any, *, batch: int, micro_batch: int, index: int) -> Tensor:
        """Loss ``index`` of a micro-batch (both counted from 0), at the positions and over the tokens that it takes."""
        if self.positions is not None:
            outputs, labels = self.positions.select(outputs, labels, batch, index)
        if self.negatives is None:
            return self.loss(outputs, labels)
        return self.negatives.cross_entropy(outputs, labels, batch=batch, micro_batch=micro_batch, loss=index)

    def stage_loss(
        self, given: Any, hidden: Any, labels: Any, *, batch: int, micro_batch: int, index: int
    ) -> Tensor | float:
        """What is added to :meth:`training_loss`, made of the stage's own input and output: here nothing.

        Args:
            given: h_{k-1}, detached: whatever the strategy, no gradient reaches it from here. None on the first stage,
                whose input is data, and behind borrowed layers, whose stage has another input.
            hidden: what the module reads, h_k, with its graph.
            labels, batch, micro_batch, index: as there.
        """
        return 0.0

    def late_loss(self, states: Tensor, labels: Tensor, targets: list[Tensor]) -> Tensor:
        """What trains the module besides, for objectives that have ``needs.late``: a scalar, with its graph.

        Args:
            states: that the module was given some batches ago, at some positions of a micro-batch, [t, H], detached.
            labels: of these positions, [t, …].
            targets: what the next exit said there, [t, …] each.
        """
        raise NotImplementedError(f"{type(self).__name__} wants late targets and has no late_loss")

    def measure(self, outputs: Any, labels: Any) -> Tensor:
        """What evaluations report, at all positions: a scalar."""
        return outputs if self.loss_fn is None else self.loss_fn(outputs, labels)

    def weight(self, labels: Any) -> Tensor | float:
        """How much a micro-batch counts in an evaluation's mean: what ``loss_fn.weight(labels)`` says, or 1."""
        return weight_of(self.loss_fn, labels)

    def copied_readout(self) -> list[Tensor]:
        """The module's copies of the last stage's LM head; empty if it needs none.

        Raises:
            InterlockingError: it needs them and doesn't say where they are.
        """
        return head_readout(self.module) if self.needs.readout is not None else []

    def copied_layers(self) -> list[Tensor]:
        """The module's slow copies of the next stage's first layers; empty if it needs none.

        Raises:
            InterlockingError: it needs them and has none, or they are trained.
        """
        return head_copies(self.module) if self.needs.layers else []

    def sources(self) -> Mapping[str, str]:
        """The module's parameters → the trunk's ("layer.name") that they can start from, when a checkpoint has none."""
        sources = getattr(self.module, "sources", None)
        return sources() if sources is not None else {}

    @property
    def inner_layers(self) -> int:
        """Layers of the model's kinds inside the module."""
        return 0

    def as_layers(self) -> ExitLayers:
        """The head as layers of the model.

        Raises:
            InterlockingError: the model has no layers of its kind.
        """
        raise InterlockingError(f"a {type(self.module).__name__} can't be written as layers of the model.")


def as_objective(head: nn.Module | Objective) -> Objective:
    """What a user gave as a head."""
    return head if isinstance(head, Objective) else Objective(head)


def last_objective() -> Objective:
    """The model's own: the last layer's outputs are its outputs."""
    return Objective(nn.Identity())
