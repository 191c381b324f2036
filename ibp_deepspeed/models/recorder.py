"""What a model hands to its decoder layers besides hidden states, made again on every stage.

Rotary tables, masks and positions follow from the shape of the input alone when nothing is padded and a row is one
document. Rather than know them for each architecture, the model's own decoder is run with layers that only note what
they are given.

Where rows hold several documents the decoder is run again with their positions, once for a micro-batch, and every
mask that it gives for the shape is narrowed to tokens of one document. Transformers would find the documents in the
positions itself, but not for all architectures (OPT, GPT-OSS), and it waits for the device to look at them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ibp_deepspeed.documents import Documents, at_hand
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.shell import Shell

LayerInputs = dict[str, Any]
_SHAPES_KEPT = 4  # training and evaluation, with one spare each
_MASK = "attention_mask"
MASKED_ATTENTION = ("sdpa", "eager")
"""Kinds of attention that take a mask as a tensor."""


class Recorder:
    """Keyword arguments of every decoder layer for hidden states of a given shape, dtype and device.

    It is no module: casting a model to bf16 must not reach its rotary frequencies, which would be off by a third
    of a turn at 2000 tokens.
    """

    def __init__(self, shell: Shell) -> None:
        self._notes = [_Note(layer) for layer in shell.layers]
        self._decoder = shell.copy_of(shell.decoder, (shell.layers, nn.ModuleList(self._notes)))
        _remove_weights(self._decoder, keep=shell.layers_name)
        self._decoder.eval()
        attends = any("Attention" in type(module).__name__ for module in shell.layers.modules())
        self._is_eager = attends and shell.hf_config._attn_implementation == "eager"
        self._cache: dict[tuple[torch.Size, torch.dtype, torch.device], list[LayerInputs]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return self  # a cache of values that follow from the key, so copies of layers share it

    def inputs_for(self, index: int, hidden: Tensor) -> LayerInputs:
        """The keyword arguments of decoder layer ``index`` for hidden states [B, S, H] of the documents at hand."""
        documents = at_hand()
        key = (hidden.shape, hidden.dtype, hidden.device)
        if key not in self._cache:
            if len(self._cache) == _SHAPES_KEPT:
                del self._cache[next(iter(self._cache))]
            self._cache[key] = self._record(*key)
            if self._is_eager and any(inputs.get(_MASK) is None for inputs in self._cache[key]):
                raise ModelError("eager attention got no mask, so it would not be causal: use attn_implementation sdpa")
        if documents is None:
            return self._cache[key][index]
        mine = (id(self), key)
        if mine not in documents.made:
            documents.made[mine] = self._record_documents(documents, *key)
        return documents.made[mine][index]

    def _record(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, **more: Tensor) -> list[LayerInputs]:
        # what is made in inference mode could not be saved for a backward pass later
        with torch.inference_mode(False), torch.no_grad():
            self._decoder.to(device)
            embedded = torch.zeros(1, dtype=dtype, device=device).expand(shape)
            return self._run(embedded, more)

    def _record_documents(self, documents: Documents, *key: Any) -> list[LayerInputs]:
        # a mask of four dimensions is handed on as it is, so that none is made here
        recorded = self._record(*key, position_ids=documents.positions, attention_mask=no_mask(key[-1]))
        narrowed: dict[int, Tensor] = {}  # layers share masks
        for inputs, alone in zip(recorded, self._cache[key], strict=True):
            mask = alone.get(_MASK)
            if id(mask) not in narrowed:
                narrowed[id(mask)] = _within(documents.same, mask)
            inputs[_MASK] = narrowed[id(mask)]
        return recorded

    def _run(self, hidden: Tensor, more: dict[str, Tensor]) -> list[LayerInputs]:
        """Some decoders take a layer's output as it is, others the first of a tuple: what goes through tells."""
        try:
            return self._run_once(hidden, more)
        except Exception:  # taking the first row of a batch fails somewhere, with any kind of error
            if any(note.in_tuple for note in self._notes):
                raise
            self._return_tuples(True)
            try:
                return self._run_once(hidden, more)
            except Exception:  # it was something else
                self._return_tuples(False)
                raise

    def _return_tuples(self, do: bool) -> None:
        for note in self._notes:
            note.in_tuple = do

    def _run_once(self, hidden: Tensor, more: dict[str, Tensor]) -> list[LayerInputs]:
        output = self._decoder(inputs_embeds=hidden, use_cache=False, **more).last_hidden_state
        recorded = [note.take(hidden.shape) for note in self._notes]
        if output.shape != hidden.shape:
            raise ModelError("the decoder gives hidden states of another shape than its layers")
        return recorded


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Numbers, texts and switches that a module has by name: models ask their parts for them."""
    own = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    return {name: value for name, value in own.items() if not name.startswith("_") and name != "training"}


def no_mask(device: torch.device) -> Tensor:
    """A mask for a decoder that is to make none."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _within(same: Tensor, mask: Tensor | None) -> Tensor:
    """A mask that also holds documents apart; None is the causal one.

    Args:
        same: whether two tokens are of one document. [B, 1, S, S].
        mask: [B or 1, 1, S, S], whether a token is seen, or what is added to its score.
    """
    if mask is None:
        return same.tril()
    if mask.dtype == torch.bool:
        return mask & same
    return mask.masked_fill(~same, torch.finfo(mask.dtype).min)


class _Note(nn.Module):
    """Stands where a decoder layer stood and notes its arguments by name.

    Attributes:
        in_tuple: whether it returns its hidden states in a tuple.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in plain_attributes(layer).items():
            setattr(self, name, value)
        self._signature = inspect.signature(layer.forward)
        self._inputs: LayerInputs | None = None
        self._shape: torch.Size | None = None
        self.in_tuple = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        bound = self._signature.bind(*args, **kwargs)
        hidden, *rest = bound.arguments.items()
        self._inputs = {}
        for name, value in rest:
            is_keywords = self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            self._inputs.update(value if is_keywords else {name: value})
        self._shape = hidden[1].shape
        return (hidden[1],) if self.in_tuple else hidden[1]

    def take(self, shape: torch.Size) -> LayerInputs:
        if self._inputs is None:
            raise ModelError("the decoder left out one of its layers, so what that layer is given is not known")
        if self._shape != shape:
            raise ModelError("the decoder gives its layers hidden states of different shapes")
        inputs, self._inputs = self._inputs, None
        return inputs


class _Zero(nn.Module):
    """Stands where an embedding stood: its values do not matter, only that they can be added."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return torch.zeros((), device=tensors[0].device)


class _Through(nn.Module):
    """Stands where something else with weights stood, and gives back the first tensor that it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _remove_weights(decoder: nn.Module, keep: str) -> None:
    """Replace whatever has parameters, so that the decoder runs on any device without any."""
    for name, child in list(decoder.named_children()):
        if name != keep and any(True for _ in child.parameters()):
            setattr(decoder, name, _Zero() if isinstance(child, nn.Embedding) else _Through())
