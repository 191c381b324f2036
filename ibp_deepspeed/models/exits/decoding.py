"""Greedy decoding, alone and with a draft by transformers' assisted generation; counted and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ibp_deepspeed.models.errors import ModelError


@dataclass(frozen=True, eq=False)
class Decoded:
    """A continuation.

    Attributes:
        tokens: those after the prompt. Shape [T].
        passes: forward passes of the model, the prompt's among them.
        drafted: tokens that a draft proposed.
        accepted: those of them that are in ``tokens``.
        seconds: wall time, from prompt to last token.
    """

    tokens: Tensor
    passes: int
    drafted: int
    accepted: int
    seconds: float

    def difference(self, other: Decoded) -> int | None:
        """The first token, from 0, at which two continuations differ; None: they are the same."""
        shared = min(len(self.tokens), len(other.tokens))
        unequal = (self.tokens[:shared] != other.tokens[:shared]).nonzero()
        if len(unequal):
            return int(unequal[0])
        return None if len(self.tokens) == len(other.tokens) else shared


def greedy(model: PreTrainedModel, inputs: Mapping[str, Tensor], **options: Any) -> Decoded:
    """The model's likeliest tokens, one forward pass each.

    Args:
        model: in eval mode.
        inputs: the prompt's tensors [1, P], as a tokenizer makes them.
        options: of ``generate``, such as ``max_new_tokens``.
    """
    with _counted(model) as lengths:
        began = time.perf_counter()
        output = model.generate(**inputs, do_sample=False, **options)[0]
        seconds = time.perf_counter() - began
    return Decoded(output[inputs["input_ids"].shape[1] :].cpu(), len(lengths), 0, 0, seconds)


def assisted(model: PreTrainedModel, draft: PreTrainedModel, inputs: Mapping[str, Tensor], **options: Any) -> Decoded:
    """The same, with a smaller model's tokens checked several in a pass: transformers' ``assistant_model``.

    How many tokens are drafted before a check is decided by the draft's generation config: up to 20, until one is
    less probable than 0.4.

    Args:
        model, inputs, options: as in :func:`greedy`.
        draft: of the same vocabulary, in eval mode.

    Raises:
        ModelError: the vocabularies are of different sizes.
    """
    if draft.config.vocab_size != model.config.vocab_size:
        raise ModelError(
            f"the draft has {draft.config.vocab_size} tokens, the model {model.config.vocab_size}: a draft needs the "
            "model's vocabulary, as its exits have it."
        )
    prompt = inputs["input_ids"].shape[1]
    with _counted(model) as lengths:
        began = time.perf_counter()
        output = model.generate(**inputs, assistant_model=draft, do_sample=False, **options)[0]
        seconds = time.perf_counter() - began
    tokens, passes = output[prompt:].cpu(), len(lengths)
    # a pass reads its drafted tokens behind one that is certain, the first behind all of the prompt
    drafted = sum(lengths) - prompt - (passes - 1)
    return Decoded(tokens, passes, drafted, len(tokens) - passes, seconds)  # each pass adds a token of the model's own


@contextmanager
def _counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Fills the list with the number of tokens that each forward pass reads."""
    lengths: list[int] = []

    def note(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()
