"""What a training consists of, whatever it reads: what the loop, its reports and its checkpoints ask of a plan."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from ibp_deepspeed.config.interlocking import InterlockingConfig
    from ibp_deepspeed.models.cut_model import CutModel
    from ibp_deepspeed.models.runs.conditions import Changes
    from ibp_deepspeed.models.runs.description import Description
    from ibp_deepspeed.pipeline import Pipeline
    from ibp_deepspeed.schedule.simulator import Costs


class HeldOutData(Protocol):
    """What an evaluation reads: this rank's micro-batches."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def describe(self) -> str:
        """How much of the split that is, in words."""
        ...

    def remarks(self) -> list[str]:
        """Sentences on data that are left out or cut off."""
        ...


class Evaluated(Protocol):
    """What an evaluation has found."""

    def row(self) -> dict[str, Any]:
        """For the history."""
        ...

    def in_words(self) -> str:
        """In a line."""
        ...

    def events(self, step: int) -> list[tuple[str, float, int]]:
        """For DeepSpeed's monitors: (name, value, step)."""
        ...


class TrainingData(Protocol):
    """Endless micro-batches of this rank's replica."""

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...

    def sample_ids(self, micro_batches_ago: int, count: int) -> list[int]:
        """Of the samples of some micro-batches, see SampleLoader."""
        ...

    def state_dict(self) -> dict[str, int]:
        """How far it is."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


class Data(NamedTuple):
    """What this rank's replica reads: training data, and what is evaluated on the way and at the end."""

    train: TrainingData
    on_the_way: HeldOutData
    at_the_end: HeldOutData


class TrainingPlan(ABC):
    """Of one run.

    Attributes:
        counted: what throughput counts.
        ds_config: the DeepSpeed configuration, without "auto".
        interlocking: its block.
        model: the cut model.
        num_stages: K.
        bounds: stage k has layers bounds[k] … bounds[k+1]-1.
        replicas: data-parallel ranks.
        description: what goes beside a checkpoint's files.
        resume: the tag of the checkpoint to resume from.
        files: texts that go into every checkpoint, by file name.
        changes: how the run differs from the one that wrote the checkpoint; None without one.
    """

    counted: ClassVar[str]
    ds_config: dict[str, Any]
    interlocking: InterlockingConfig
    model: CutModel
    num_stages: int
    bounds: list[int]
    replicas: int
    description: Description
    resume: str | None
    files: dict[str, str]
    changes: Changes | None

    @abstractmethod
    def per_sample(self, args: argparse.Namespace) -> int:
        """What is counted, in a sample."""

    @abstractmethod
    def flops(self, args: argparse.Namespace) -> float:
        """Floating-point operations that training on one of what is counted needs, heads among them."""

    @abstractmethod
    def costs(self, args: argparse.Namespace) -> list[Costs]:
        """Of each stage's pieces of work, from counted operations; a mean stage takes 1 forward."""

    @abstractmethod
    def head_parameters(self) -> list[int]:
        """Parameters of each head that is trained."""

    @abstractmethod
    def label_entropy(self) -> float:
        """In nats: what knowing nothing but how often labels occur would give."""

    @abstractmethod
    def data_digest(self, args: argparse.Namespace) -> str:
        """The same where the data are the same."""

    @abstractmethod
    def data_lines(self, args: argparse.Namespace) -> list[str]:
        """What the model reads and gives, and who said so."""

    @abstractmethod
    def open_data(self, pipeline: Pipeline, args: argparse.Namespace) -> Data:
        """Training and held-out micro-batches of this rank's replica.

        Raises:
            DataError: less than one batch of data.
        """

    @abstractmethod
    def remarks(self, pipeline: Pipeline, args: argparse.Namespace, data: Data) -> list[str]:
        """What else is said at the start."""

    @abstractmethod
    def evaluate(self, pipeline: Pipeline, held_out: Any) -> Evaluated:
        """All exits on held-out data; on all ranks together."""

    @abstractmethod
    def table(self, evaluation: Any) -> str:
        """What an evaluation has found, for the end of a run."""

    @property
    def frozen_stages(self) -> tuple[int, ...]:
        """Those with nothing to train but a head."""
        return ()

    def token_counts(self) -> Tensor | None:
        """How often each token occurs in the training data, [V], for heads that draw some; None: they draw none."""
        return None


ParseArguments = Callable[[str | None], argparse.Namespace]
MakePlan = Callable[[argparse.Namespace], TrainingPlan]


def few_exits(exits: Sequence[int], stages: int) -> list[str]:
    """Which exits there are, by their numbers, where not every stage is one."""
    if len(exits) == stages:
        return []
    if len(exits) == 1:
        return [f"the last of the {stages} stages is the only exit: this is backpropagation"]
    return [f"exits {', '.join(str(k + 1) for k in exits)} of {stages} have a loss"]
