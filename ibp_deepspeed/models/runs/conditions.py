"""What decides a training beside its model: recorded in every checkpoint, compared when one is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from ibp_deepspeed.config.batch_sizes import BATCH_SIZES, COUNT, SIZE, with_batch_sizes
from ibp_deepspeed.models.errors import ModelError

if TYPE_CHECKING:
    from ibp_deepspeed.data import TokenFile
    from ibp_deepspeed.data.token_file import SplitRecord
    from ibp_deepspeed.models.runs.description import Description

EFFECTS = {
    "seed": "the rest of this epoch comes in another order, so that some of its samples come twice and others not",
    "data": "this epoch begins again, with other samples",
    "tokenizer": "token ids may mean other words",
    "sequence-length": "this epoch begins again, with other samples",
    "document-masks": "this epoch begins again, with other samples",
    "batch-size": "the order of the samples stays, and those that fill no whole micro-batch are passed over",
}
"""What may be allowed to change → what that does to the order of the data."""
_OTHER_SAMPLES = {"data", "sequence-length", "document-masks"}
_NOT_OF_THE_TRAINING = {"steps_per_print", "wall_clock_breakdown", "tensorboard", "wandb", "csv_monitor", "comet"}
_DIGITS = 12  # of a checksum that a message shows


class Conditions(BaseModel):
    """What decides which samples a batch has; checksums are SHA-256 in hexadecimal digits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int
    """Of the order of the data, and of new weights."""
    data: str
    """Of the training split's tokens, and of their marks if there are some; of a mixture, all and their shares."""
    held_out: str
    """The same of the held-out split."""
    tokenizer: str
    """Of its file."""
    micro_batch_size: int
    """Samples, of one replica."""
    micro_batches: int
    """M."""
    replicas: int
    documents: str | None = None
    """Of the bounds of the documents that samples keep apart; None: samples cross them, as with earlier versions."""

    @classmethod
    def of(
        cls,
        train: TokenFile,
        seed: int,
        ds_config: Mapping[str, Any],
        replicas: int,
        document_masks: bool = False,
        mixture: Sequence[tuple[TokenFile, float]] = (),
    ) -> Conditions:
        """Those of a training.

        Args:
            train: its data.
            seed: of the command line.
            ds_config: without "auto".
            replicas: data-parallel ranks.
            document_masks: whether documents are kept apart, by the bounds that the texts then have.
            mixture: where they are several, all data and their shares; ``train`` is the first.
        """
        sources = [(file.manifest, share) for file, share in mixture] or [(train.manifest, 1.0)]
        bounds = [m.train.bounds.sha256 for m, _ in sources if m.train.bounds is not None] if document_masks else []
        manifest = train.manifest
        sizes = with_batch_sizes(ds_config, replicas)
        tokenizer = train.path.parent / manifest.tokenizer_file
        return cls(
            seed=seed,
            data=_joined([_checksum(m.train) for m, _ in sources], [share for _, share in sources]),
            held_out=_joined([_checksum(m.heldout) for m, _ in sources]),
            tokenizer=hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.exists() else "none",
            micro_batch_size=sizes[SIZE],
            micro_batches=sizes[COUNT],
            replicas=replicas,
            documents=_joined(bounds) if bounds else None,
        )

    @property
    def batch_size(self) -> int:
        """Samples of a batch, of all replicas."""
        return self.micro_batch_size * self.micro_batches * self.replicas

    def batch(self) -> str:
        """A batch in words."""
        return f"{self.micro_batches} micro-batches of {self.micro_batch_size} samples × {self.replicas} replicas"


@dataclass(frozen=True)
class Changes:
    """How a training that is resumed differs from the one that wrote the checkpoint.

    Attributes:
        lines: for the user.
        restarts_epoch: whether the position in the epoch means nothing any more.
        optimizer: settings of the optimizer that are others, by their names.
        schedule: whether the learning rate may be another one.
    """

    lines: list[str] = field(default_factory=list)
    restarts_epoch: bool = False
    optimizer: frozenset[str] = frozenset()
    schedule: bool = False


def changes_since(path: Path, saved: Description, planned: Description, allowed: Collection[str]) -> Changes:
    """Compare a checkpoint's training with the planned one.

    Args:
        path: of the checkpoint.
        saved: its description.
        planned: of the run.
        allowed: names of ``EFFECTS`` that may differ.

    Raises:
        ModelError: others do, which are named.
    """
    differing = {name: values for name, *values in _conditions(saved, planned)}
    refused = [name for name in differing if name not in allowed]
    if refused:
        seen = ", ".join(f"{name} {differing[name][0]}, not {differing[name][1]}" for name in refused)
        raise ModelError(
            f"{path} was trained with {seen}: resume with the same, give another --output, or allow it with "
            f"--allow-changed {' '.join(refused)} (its --help says what that does to the order of the data)."
        )
    lines = [f"{name} is {new}, was {old}: {EFFECTS[name]}" for name, (old, new) in differing.items()]
    lines += _remarks(path.name, saved.conditions, planned.conditions)
    settings = {name: values for name, *values in _settings(saved, planned)} if saved.settings else {}
    lines += [f'since {path.name}: "{name}" is {new}, was {old}' for name, (old, new) in settings.items()]
    optimizer, prefix = [name for name in settings if name.startswith("optimizer.")], "optimizer.params."
    return Changes(
        lines,
        restarts_epoch=not _OTHER_SAMPLES.isdisjoint(differing),
        optimizer=frozenset(name.removeprefix(prefix).partition(".")[0] for name in optimizer if prefix in name),
        schedule=bool(optimizer) or any(name.startswith("scheduler.") for name in settings),
    )


def _conditions(saved: Description, planned: Description) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of what differs and decides what the samples are and how they come."""
    if saved.sequence_length != planned.sequence_length:
        yield "sequence-length", saved.sequence_length, planned.sequence_length
    old, new = saved.conditions, planned.conditions
    if old is None or new is None:
        return
    if old.seed != new.seed:
        yield "seed", old.seed, new.seed
    for name in ("data", "tokenizer"):
        ours, theirs = getattr(new, name), getattr(old, name)
        if ours != theirs:
            yield name, f"of checksum {theirs[:_DIGITS]}", f"{ours[:_DIGITS]}"
    if old.documents != new.documents:
        yield "document-masks", _documents(old), _documents(new)
    if old.batch_size != new.batch_size:
        yield "batch-size", f"{old.batch_size} ({old.batch()})", f"{new.batch_size} ({new.batch()})"


def _documents(conditions: Conditions) -> str:
    return "off" if conditions.documents is None else f"on (bounds of checksum {conditions.documents[:_DIGITS]})"


def _remarks(tag: str, old: Conditions | None, new: Conditions | None) -> Iterator[str]:
    """Lines on what differs and is no other training, or can't be compared."""
    if old is None:
        yield f"{tag} was written by an earlier version, without its seed and checksums: they can't be compared"
    if old is None or new is None:
        return
    if old.batch_size == new.batch_size and old.batch() != new.batch():
        yield f"a batch is {new.batch()}, was {old.batch()}: the order of the samples stays"
    if old.held_out != new.held_out:
        yield "the held-out data are others: held-out losses can't be compared with those before"


def _settings(saved: Description, planned: Description) -> Iterator[tuple[str, str, str]]:
    """Name, old and new value of what differs in the configuration, but for the batch and what is only shown."""
    pairs = []
    for each in (saved, planned):
        values = json.loads(json.dumps({**each.settings, "interlocking": each.interlocking}))
        left_out = {*BATCH_SIZES} | _NOT_OF_THE_TRAINING
        pairs.append(dict(_flat({key: value for key, value in values.items() if key not in left_out})))
    old, new = pairs
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            yield name, _in_words(old, name), _in_words(new, name)


def _in_words(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "not given"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _joined(checksums: Sequence[str], shares: Sequence[float] = ()) -> str:
    """One of several, in their order, with their shares; that of one alone."""
    if len(checksums) == 1:
        return checksums[0]
    return hashlib.sha256(json.dumps([*checksums, *(f"{share:.9g}" for share in shares)]).encode()).hexdigest()


def _checksum(split: SplitRecord) -> str:
    if split.marks is None:
        return split.sha256
    return hashlib.sha256(f"{split.sha256} {split.marks.sha256}".encode()).hexdigest()
