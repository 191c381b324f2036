"""Times of a model's layers and heads that were measured on a device (``scripts/profile_stage.py``), for planning."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from ibp_deepspeed.atomic_files import replace_text
from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.errors import PlanError, first_line
from ibp_deepspeed.json_text import parsed, small_text
from ibp_deepspeed.planner.hardware import Device, Link
from ibp_deepspeed.planner.workload import Work, Workload

AGAIN = "measure it with scripts/profile_stage.py"
HEAD_OPTIONS = ("readout", "blocks", "rank", "aux_tokens", "negatives", "chunk_tokens", "objective")
"""Options of ``aux_head`` that what a head takes depends on."""
_UNSAID: dict[str, Any] = {"objective": "cross_entropy"}
"""What a profile was measured with that doesn't say."""

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
DType = Literal["float32", "bfloat16"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Record):
    """Median, smallest and largest of repeated measurements, seconds."""

    median: Seconds
    low: Seconds
    high: Seconds


class Piece(_Record):
    """A kind of layer, or the auxiliary head.

    Seconds are of a micro-batch. B and W are those of the engine's split backward pass, one after the other;
    ``backward`` is both at once, as 1F1B runs it. Of compiled layers, which are not split, B is the whole backward pass
    that an input gradient alone takes, and W is 0.
    """

    name: str
    layers: list[NonNegativeInt]
    """Those of ``layer_specs`` that are like it; of a head none."""
    parameters: NonNegativeInt
    trained: NonNegativeInt
    forward: Spread
    """F; with a loss behind it that too, which takes the gradient of its logits as it goes through them."""
    input_gradient: Spread
    weight_gradient: Spread
    backward: Spread
    kept: NonNegativeInt
    """Bytes that its backward pass needs of its forward pass, weights left out."""
    peak: NonNegativeInt | None
    """Most bytes on a GPU while it ran, weights and gradients included; None without a GPU."""

    def work(self) -> Work:
        """In seconds."""
        b, w = self.input_gradient.median, self.weight_gradient.median
        at_once = self.backward.median - b - w
        return Work(self.forward.median, b, w, self.parameters, self.trained, float(self.kept), at_once)


class Message(_Record):
    """The hidden states of a micro-batch, from one process of this host to another one."""

    backend: Literal["gloo", "nccl"]
    size: PositiveInt
    """Bytes."""
    seconds: Spread
    latency: Spread
    """Seconds of a message of one number."""

    def link(self) -> Link:
        """Latency, and a bandwidth with which the message takes what it took; of a tiny message no bandwidth shows."""
        latency = min(self.latency.median, self.seconds.median)
        sending = self.seconds.median - latency
        return Link(self.size / sending if sending else math.inf, latency)


class Subject(_Record):
    """What a profile is of: another model, micro-batch, dtype or head takes other times."""

    config: dict[str, Any]
    """The model's Hugging Face config, but for what no time depends on (``ibp_deepspeed.models.profiling.subject``)."""
    dtype: DType
    sequence_length: PositiveInt
    samples: PositiveInt
    head: dict[str, Any]
    """HEAD_OPTIONS of the auxiliary head. Asked for: empty if there is none, then any will do."""
    compiled: bool | None
    """Whether layers are compiled. Asked for: None if either will do."""

    def difference(self, asked: Subject) -> tuple[str, object, object] | None:
        """The first thing that is another one: its name, what it is here, what is asked for."""
        for key in ("model_type", *sorted(self.config.keys() | asked.config.keys())):
            if self.config.get(key) != asked.config.get(key):
                return key, self.config.get(key), asked.config.get(key)
        names = {"dtype": "dtype", "sequence_length": "sequence length", "samples": "micro-batch size"}
        for field, name in names.items():
            if getattr(self, field) != getattr(asked, field):
                return name, getattr(self, field), getattr(asked, field)
        for key, value in (asked.head or {}).items():
            if (there := self.head.get(key, _UNSAID.get(key))) != value:
                return f"the head's {key}", there, value
        if asked.compiled is not None and asked.compiled != self.compiled:
            return "compile", self.compiled, asked.compiled
        return None


class Profile(_Record):
    """What ``scripts/profile_stage.py`` writes."""

    version: Literal[1] = 1
    model: str
    """As it was named."""
    config_checksum: str
    """sha256 of the subject's config."""
    subject: Subject
    message_bytes: PositiveInt
    """Of the hidden states of a micro-batch."""
    device: str
    memory: PositiveInt | None
    """Bytes of the GPU; None: of a CPU, whose memory all processes of a host share."""
    threads: PositiveInt | None
    """Of torch, on a CPU."""
    torch: str
    repeats: PositiveInt
    layers: PositiveInt
    """Of ``layer_specs``: embedding, decoder layers, last layer."""
    pieces: list[Piece]
    head: Piece
    message: Message | None
    no_message: str | None
    """Why messages were not measured."""

    @model_validator(mode="after")
    def _complete(self) -> Profile:
        """Every layer from the embedding to the LM head belongs to one piece."""
        found = [layer for piece in self.pieces for layer in piece.layers]
        missing = [layer for layer in range(self.layers) if layer not in found]
        if missing:
            raise ValueError(f"layer {missing[0]} of {self.layers} is missing")
        if len(found) != self.layers:
            raise ValueError(f"its pieces have {len(found)} layers, the model {self.layers}")
        if self.config_checksum != checksum(self.subject.config):
            raise ValueError("its config_checksum is not that of its config")
        return self

    def workload(self) -> Workload:
        """The model's layers and head in seconds: for a device of one operation a second, as :meth:`machine` is.

        A head goes forward and back at once (``AuxLoss``).
        """
        of = {layer: piece.work() for piece in self.pieces for layer in piece.layers}
        layers = tuple(of[index] for index in range(len(of)))
        head = replace(self.head.work(), input_gradient=self.head.backward.median, weight_gradient=0.0, at_once=0.0)
        tokens = self.subject.samples * self.subject.sequence_length
        weight_bytes = 4 if self.subject.dtype == "float32" else 2
        return Workload(self.model, layers, head, self.message_bytes, tokens, weight_bytes)

    def machine(self, path: Path, memory: float | None = None) -> Device:
        """The device, with times that are seconds already.

        Args:
            path: of the file, for the reader.
            memory: bytes, in the place of the device's own.
        """
        text = f"measured, {path} ({self.about})"
        return Device(self.device, 1.0, self.memory if memory is None else memory, text)

    @property
    def about(self) -> str:
        """What it was measured with, in words."""
        threads = [] if self.threads is None else [f"{self.threads} thread{'s' * (self.threads > 1)}"]
        words = [self.subject.dtype, *["compiled"] * bool(self.subject.compiled), *threads, f"torch {self.torch}"]
        return ", ".join(words)


def checksum(config: Mapping[str, Any]) -> str:
    """sha256 of a config, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write_profile(profile: Profile, path: Path) -> None:
    """A JSON file that is complete or not there."""
    replace_text(path, json.dumps(profile.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")


def read_profile(path: Path) -> Profile:
    """A profile that is whole.

    Raises:
        PlanError: there is none, or it is damaged or of another version.
    """
    try:
        values = parsed(small_text(path))
    except OSError as error:
        raise PlanError(f"the profile {path} can't be read ({error.strerror}): {AGAIN}.") from None
    except ValueError as error:
        raise PlanError(f"the profile {path} is no JSON ({first_line(error)}): {AGAIN}.") from None
    version = values.get("version") if isinstance(values, dict) else None
    if version != (known := Profile.model_fields["version"].default):
        raise PlanError(f"the profile {path} has version {version}, this program reads {known}: {AGAIN}.")
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        raise PlanError(f"the profile {path} is damaged: {_sentence(error)}; {AGAIN}.") from None


def check_profile(profile: Profile, path: Path, asked: Subject, words: Sequence[str]) -> None:
    """That a profile is of what is going to run.

    Args:
        profile, path: what was read, and where.
        asked: what is going to run.
        words: its model on the command line, ``--model … --set …``.

    Raises:
        PlanError: it is not; says what differs, and how to measure again.
    """
    different = profile.subject.difference(asked)
    if different is None:
        return
    name, there, here = different
    words = ["python", "scripts/profile_stage.py", *words]
    words += ["--sequence-length", str(asked.sequence_length), "--micro-batch-size", str(asked.samples)]
    words += ["--fp32"] * (asked.dtype == "float32") + ["--compile"] * bool(asked.compiled)
    words += head_words(asked.head)
    raise PlanError(
        f"the profile {path} was measured with {name} {there}, here it is {here}: measure again with "
        f"{shlex.join([*words, '--out', str(path)])}"
    )


def head_words(options: Mapping[str, Any]) -> list[str]:
    """``--head …`` of options that are not as they are by default."""
    plain = head_options(AuxHeadConfig())
    given = [f"{name}={value}" for name, value in options.items() if value != plain[name]]
    return ["--head", *given] if given else []


def head_options(options: AuxHeadConfig) -> dict[str, Any]:
    """Those that a head's time depends on; the objective as ``--head`` takes it."""
    found = options.model_dump(include=set(HEAD_OPTIONS))
    name, given = options.objective.name, options.objective.model_dump(exclude_defaults=True)
    return {**found, "objective": json.dumps({"name": name, **given}) if given else name}


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {message[0].lower()}{message[1:]}, got {first['input']!r}" if where else message
