"""The proof that a model of a config is cut rightly: a small one of its kind, compared with the uncut model."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ibp_deepspeed.errors import OutputError
from ibp_deepspeed.models.errors import ModelError, in_words
from ibp_deepspeed.models.proofs.checks import Pair
from ibp_deepspeed.models.proofs.small import small_config

LIMITS = {
    "logits": 1e-5,
    "causality": 1e-5,
    "gradients": 1e-4,
    "padding": 1e-5,
    "documents": 1e-5,
    "export": 1e-5,
    "exits": 1e-5,
}
"""Check → the most that may differ in fp32: of the largest logit, or of a gradient's norm."""
MEANINGS = {
    "logits": "those of the cut model and the uncut one, from whose folder its layers were read,",
    "causality": "logits of earlier tokens, before and after the last one has changed,",
    "gradients": "those of all parameters in training, cut and uncut,",
    "padding": "logits of real tokens in rows padded on the right, without and with a mask,",
    "documents": "logits of rows that hold several documents, and of each document alone,",
    "export": "logits of the layers and of their export, loaded with from_pretrained,",
    "exits": "the same of the first layers with a head",
}
T = TypeVar("T")
_MAY_LACK = ("padding", "documents", "exits")
"""Checks that a model may be unable to take: without masks; where a state crosses documents, so that document masks are
refused; where first layers are no smaller model, which the export refuses."""


@dataclass(frozen=True)
class Proof:
    """What was compared of a small model.

    Attributes:
        model_type: of the config.
        layers: of the small model.
        differences: check → how much differs, see ``LIMITS``; of a refusal, the last is what is refused.
        lacks: check that the model can't take → why, in words.
        refusal: why the model is not cut, as one sentence; None: it is.
    """

    model_type: str
    layers: int = 0
    differences: dict[str, float] = field(default_factory=dict)
    lacks: dict[str, str] = field(default_factory=dict)
    refusal: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def prove(config: PretrainedConfig) -> Proof:
    """Compare a small model of the kind of a config, cut and uncut, on the CPU; a second or two.

    The generators of the caller are as before afterwards.

    Raises:
        OutputError: its files can't be written.
    """
    try:
        with _undisturbed():
            small = small_config(config)
            with tempfile.TemporaryDirectory(prefix="ibp_proof_") as folder:
                return _compared(config.model_type, small, Path(folder))
    except Exception as error:  # configs that are unlike any other, by any kind of error
        if _of_the_host(error):
            raise OutputError(f"a small model to prove the cut with can't be written: {in_words(error)}") from error
        return Proof(config.model_type, refusal=in_words(error))


def _compared(model_type: str, small: PretrainedConfig, folder: Path) -> Proof:
    try:
        pair = _asked(lambda: Pair(small, folder))
    except ModelError as error:
        return Proof(model_type, refusal=_sentence(model_type, f"loading: its layers {error}"))
    checks: dict[str, Callable[[], float]] = {
        "logits": pair.logits,
        "causality": pair.causality,
        "gradients": pair.gradients,
        "padding": pair.padding,
        "documents": pair.documents,
        "export": lambda: pair.export(folder / "whole", len(pair.bounds) - 1),
        "exits": lambda: pair.export(folder / "first", 1),
    }
    proof = Proof(model_type, len(pair.layers) - 2)
    for name, check in checks.items():
        try:
            difference = _asked(check)
        except ModelError as error:
            failure = str(error)
            refused = name not in _MAY_LACK
        else:
            proof.differences[name] = difference
            if difference <= LIMITS[name]:
                continue
            failure = f"differ by {difference:.1e} (at most {LIMITS[name]:.0e})"
            refused = name not in ("documents", "exits")
        if refused:
            return replace(proof, refusal=_sentence(model_type, f"{name}: {MEANINGS[name]} {failure}"))
        proof.differences.pop(name, None)
        proof.lacks[name] = failure
    return proof


def _of_the_host(error: Exception) -> bool:
    """Whether an error says nothing of the model: a full device, no permission. Transformers' own have no number."""
    return isinstance(error, OutputError | SafetensorError) or (isinstance(error, OSError) and error.errno is not None)


def _sentence(model_type: str, what: str) -> str:
    why = f"because a small one like it fails in its {what}"
    return f"a model of type '{model_type}' with this config is not cut, {why}"


def _asked(check: Callable[[], T]) -> T:
    """The result of a check, or in words why there is none."""
    try:
        return check()
    except ModelError:
        raise
    except Exception as error:  # a model that can't be cut may say so with any kind of error
        if _of_the_host(error):
            raise
        raise ModelError(f"can't be had: {in_words(error)}") from error


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Files are written by this process: in a job of several, ``save_pretrained`` writes on rank 0 alone."""
    name = "should_save_on_this_rank"
    if not hasattr(PreTrainedModel, name):  # of older versions
        yield
        return
    with mock.patch.object(PreTrainedModel, name, lambda model, is_main_process: is_main_process):
        yield


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever the caller's modes are, and without a word of transformers'."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu"),
            _writing(),
        ):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
