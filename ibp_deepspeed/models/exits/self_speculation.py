"""A model drafts with its own first layers: one cache, and what the draft computed is used again in the check.

An exit is the model's first layers with a head of its own, so the states behind them are the model's too. A round of
self-speculative decoding (LayerSkip, arXiv:2404.16710, section 4.3):

1. the exit reads the tokens that are certain and proposes the next one, reads it, proposes, … as long as it is sure;
2. the model's other layers read all these states at once, and the tokens that the model would have chosen are kept,
   with one of its own behind them;
3. keys and values of the tokens that were refused are dropped.

No layer is computed twice for a token that is kept, and every key and value is held once.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.exits.decoding import Decoded
from ibp_deepspeed.models.shell import Shell

LONGEST_DRAFT = 8
"""Tokens that are drafted before a check, at most."""
SURE = 0.2
"""Drafting ends at a token that is less probable. Exits agree with their model more often than they are sure."""


class SelfSpeculation:
    """Greedy decoding of a model that drafts with an exit of its own.

    Args:
        model: in eval mode.
        draft: the exit as a model: its first ``shared`` decoder layers have the weights of the model's, others are
            blocks of its head. From here on it holds the model's layers in the place of its own, which are freed.
        shared: decoder layers that both have, at least one and fewer than the model has.

    Raises:
        ModelError: layers keep a state that can't be taken back, such as those of a recurrent network.
    """

    def __init__(self, model: PreTrainedModel, draft: PreTrainedModel, shared: int) -> None:
        self.model, self.draft, self.shared = model, draft, shared
        _check_layers(model.config)
        shell = Shell(model.config)
        layers, of_draft = _layers(model, shell), _layers(draft, shell)
        if not 0 < shared < len(layers) or shared > len(of_draft):
            raise ModelError(f"an exit of {shared} of {len(layers)} decoder layers can't draft: give a smaller exit.")
        self._depths = len(layers), len(of_draft) - shared
        for index in range(shared):
            of_draft[index] = layers[index]
        states = _States()
        layers[shared - 1].register_forward_hook(states.note)
        self._states = states
        replays = [_Replay(layer, states if i == shared - 1 else None) for i, layer in enumerate(layers[:shared])]
        self._upper = _with_layers(model, list(zip(layers, [*replays, *layers[shared:]], strict=True)))

    @torch.inference_mode()
    def decode(self, inputs: Mapping[str, Tensor], max_new_tokens: int, eos: frozenset[int] = frozenset()) -> Decoded:
        """The model's likeliest tokens, as greedy decoding finds them.

        Args:
            inputs: with the prompt's ``input_ids`` [1, P].
            max_new_tokens: the most.
            eos: tokens that end the text, the last of what is returned.
        """
        began = time.perf_counter()
        cache = _SharedCache(*self._depths, self.shared)
        pending, found, passes, drafted = inputs["input_ids"], list[int](), 0, 0
        kept = 0  # tokens whose keys and values are in all layers
        while len(found) < max_new_tokens and not eos & set(found[-1:]):
            most = min(LONGEST_DRAFT, max_new_tokens - len(found) - 1)
            draft, states = self._propose(pending, cache, most)
            chosen = self._choose(torch.cat([pending, draft], dim=1), states, cache, draft.shape[1] + 1)
            equal = int((chosen[:-1] == draft[0]).long().cumprod(0).sum())
            new = chosen[: equal + 1].tolist()
            passes, drafted = passes + 1, drafted + draft.shape[1]
            kept += pending.shape[1] + equal
            cache.keep(kept)
            ends = [i for i, token in enumerate(new) if token in eos]
            found += new[: ends[0] + 1] if ends else new
            pending = chosen[equal : equal + 1][None]
        tokens = torch.tensor(found)
        return Decoded(tokens, passes, drafted, len(found) - passes, time.perf_counter() - began)

    @torch.inference_mode()
    def plain(self, inputs: Mapping[str, Tensor], max_new_tokens: int, eos: frozenset[int] = frozenset()) -> Decoded:
        """The same without a draft: a pass of the whole model for each token, in as spare a loop."""
        began = time.perf_counter()
        cache = Cache(layers=[DynamicLayer() for _ in range(self._depths[0])])
        pending, found = inputs["input_ids"], list[int]()
        while len(found) < max_new_tokens and not eos & set(found[-1:]):
            pending = _read(self.model, pending, cache, 1)[:, -1:].argmax(-1)
            found.append(int(pending))
        return Decoded(torch.tensor(found), len(found), 0, 0, time.perf_counter() - began)

    def _propose(self, pending: Tensor, cache: _SharedCache, most: int) -> tuple[Tensor, Tensor]:
        """Drafted tokens [1, n], and states behind the shared layers of those and of the pending ones [1, m + n, H]."""
        draft, states, unread = list[Tensor](), list[Tensor](), pending
        with self._states.noted(states):
            while True:
                logits = _read(self.draft, unread, cache.of_draft, 1)[:, -1:]
                probability, token = logits.float().softmax(-1).max(-1)
                if len(draft) >= most or probability < SURE:
                    break
                draft.append(token)
                unread = token
        return torch.cat(draft, dim=1) if draft else pending[:, :0], torch.cat(states, dim=1)

    def _choose(self, tokens: Tensor, states: Tensor, cache: _SharedCache, last: int) -> Tensor:
        """The model's likeliest token behind each of the ``last`` ones of these tokens. [last]"""
        with self._states.replayed(states):
            return _read(self._upper, tokens, cache.of_model, last)[0, -last:].argmax(-1)


class _States:
    """What the last shared layer gave, and gives again."""

    def __init__(self) -> None:
        self._noted: list[Tensor] | None = None
        self._replayed: Tensor | None = None
        self._is_tuple = False

    def note(self, layer: nn.Module, args: Any, output: Any) -> None:
        """A forward hook."""
        if self._noted is not None:
            self._is_tuple = isinstance(output, tuple)
            self._noted.append(output[0] if self._is_tuple else output)

    @contextmanager
    def noted(self, states: list[Tensor]) -> Iterator[None]:
        """The layer's outputs go into this list."""
        self._noted = states
        try:
            yield
        finally:
            self._noted = None

    @contextmanager
    def replayed(self, states: Tensor) -> Iterator[None]:
        """``output`` is this."""
        self._replayed = states
        try:
            yield
        finally:
            self._replayed = None

    def output(self) -> Any:
        """In the form in which the layer gave it."""
        return (self._replayed,) if self._is_tuple else self._replayed


class _Replay(nn.Module):
    """Stands where a shared decoder layer stood, with its attributes; the last one gives states that are known."""

    def __init__(self, layer: nn.Module, states: _States | None) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a child
        self._states = states

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if self._states is None else self._states.output()


class _SharedCache:
    """Keys and values of a model's layers and of the blocks of the draft's head, as each of the two sees them.

    A model asks its first layer how much is there. Those that replay ask for the first layer behind them: while
    tokens are drafted the shared layers are ahead.
    """

    def __init__(self, layers: int, blocks: int, shared: int) -> None:
        lower, upper, head = ([DynamicLayer() for _ in range(n)] for n in (shared, layers - shared, blocks))
        self._all = [*lower, *upper, *head]
        self.of_draft = Cache(layers=[*lower, *head])
        self.of_model = Cache(layers=[*[upper[0]] * shared, *upper])

    def keep(self, length: int) -> None:
        """Drop what is behind the first ``length`` tokens."""
        for layer in self._all:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def _read(model: PreTrainedModel, tokens: Tensor, cache: Cache, last: int) -> Tensor:
    """Logits of the last positions, or of all where a model has no way to leave some out. [1, last or more, V]"""
    few = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=tokens, past_key_values=cache, use_cache=True, **few).logits


def _check_layers(config: PretrainedConfig) -> None:
    """Only attention's keys and values can be taken back; a window's are kept whole here, the mask is the model's."""
    kinds = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ModelError(
            f"model type '{config.model_type}' keeps more than keys and values ({names}), which can't be taken back "
            "when a draft is refused: decode without --draft-exit."
        )


def _layers(model: PreTrainedModel, shell: Shell) -> nn.ModuleList:
    decoder = model.get_submodule(shell.decoder_name) if shell.decoder_name else model
    found = decoder.get_submodule(shell.layers_name)
    assert isinstance(found, nn.ModuleList)
    return found


def _with_layers(model: PreTrainedModel, swaps: list[tuple[nn.Module, nn.Module]]) -> PreTrainedModel:
    """A model with the second layer of each pair in the place of the first; all weights are the model's own."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo | {id(old): new for old, new in swaps})
