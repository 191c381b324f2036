"""Profiles that nobody measured."""

from __future__ import annotations

from typing import Any

from ibp_deepspeed.config.interlocking import AuxHeadConfig
from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.models.profiling.subject import subject_of
from ibp_deepspeed.planner.profile import Message, Piece, Profile, Spread, checksum


def spread(seconds: float) -> Spread:
    return Spread(median=seconds, low=seconds, high=2 * seconds)


def piece(name: str, layers: list[int], f: float, b: float, w: float, at_once: float | None = None) -> Piece:
    """With a thousand parameters and 64 kept bytes; B and W at once take as long as both unless told."""
    return Piece(
        name=name,
        layers=layers,
        parameters=1000,
        trained=900,
        forward=spread(f),
        input_gradient=spread(b),
        weight_gradient=spread(w),
        backward=spread(b + w if at_once is None else at_once),
        kept=64,
        peak=None,
    )


def profile(model: CausalLM, pieces: list[Piece], head: Piece, **changes: Any) -> Profile:
    """Of a model in fp32, 1 × 16 tokens a micro-batch, a private head; a message takes 3 ms, 1 ms of them latency."""
    about: dict[str, Any] = {"dtype": "float32", "sequence_length": 16, "samples": 1, "compiled": False}
    subject = subject_of(model, AuxHeadConfig(), **about)
    message = Message(backend="gloo", size=1000, seconds=spread(3e-3), latency=spread(1e-3))
    values: dict[str, Any] = {"model": "made.json", "device": "Abacus", "memory": 2**34, "threads": None}
    values |= {"torch": "2.13.0", "repeats": 3, "message_bytes": 1000, "message": message, "no_message": None}
    return Profile(
        **{**values, **changes},
        config_checksum=checksum(subject.config),
        subject=subject,
        layers=model.num_layers,
        pieces=pieces,
        head=head,
    )


def alike(model: CausalLM, layer: float = 1.0, ends: float = 0.0, head: float = 0.0, **changes: Any) -> Profile:
    """All decoder layers take ``layer`` seconds for each of F, B and W, the embedding a 30th of all that."""
    last = model.num_layers - 1
    pieces = [
        piece("embedding", [0], layer / 20, layer / 20, 0.0),
        piece("decoder layer 1", list(range(1, last)), layer, layer, layer),
        piece("last layer and loss", [last], ends, ends / 10, 0.0),
    ]
    return profile(model, pieces, piece("auxiliary head", [], head, head / 10, 0.0), **changes)
