"""All exits of a trained model in one process: every head and the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss, LazyLogits
from models.causal_lm import CausalLM
from models.errors import ModelError
from models.hf.assemble import assemble, exit_parts
from models.layers import AuxiliaryHead
from models.runs.checkpoint import Checkpoint


class Exits:
    """A checkpoint's model with its K exits, on one device. Exit k is behind the first k stages; exit K is the model.

    Args:
        path: the checkpoint, see :class:`models.checkpoint.Checkpoint`.
        device: where the layers go.

    Raises:
        ModelError: a file that is missing or does not fit.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.checkpoint = Checkpoint(path)
        self.folder, self.description = self.checkpoint.folder, self.checkpoint.description
        self._options = InterlockingConfig.parse(self.description.interlocking).aux_head
        self.config = self.description.config()
        self.model = CausalLM(self.config, weights=self.checkpoint)
        self.device = torch.device(device)

    def __len__(self) -> int:
        """K."""
        return len(self.description.bounds) - 1

    @cached_property
    def layers(self) -> list[nn.Module]:
        """All pipeline layers, in fp32."""
        return [self._ready(self.model.build_layer(index)) for index in range(self.model.num_layers)]

    @cached_property
    def heads(self) -> dict[int, AuxiliaryHead]:
        """Exit (1 … K-1) → its head in fp32, those that the checkpoint has."""
        states = {exit_: self.checkpoint.head_state(self.boundary(exit_)) for exit_ in range(1, len(self))}
        return {exit_: self._head(exit_, state) for exit_, state in states.items() if state is not None}

    def boundary(self, exit_: int) -> int:
        """The pipeline layer before which an exit's head stands."""
        return self.description.bounds[exit_] + (self._options.borrow if self._options else 0)

    def check(self, exit_: int) -> None:
        """Raises a ModelError when there is no such exit."""
        if not 1 <= exit_ <= len(self) or (exit_ < len(self) and exit_ not in self.heads):
            there = ", ".join(str(k) for k in [*self.heads, len(self)])
            raise ModelError(f"{self.folder} has no exit {exit_}: its exits are {there} (the last one is the model).")

    @torch.no_grad()
    def losses(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Iterator[tuple[Tensor, int]]:
        """For each batch: the mean loss of each exit, NaN where there is no head [K], and its number of tokens."""
        loss_fn = CausalLMLoss()
        readers = {self.boundary(exit_): (exit_, head) for exit_, head in self.heads.items()}
        for input_ids, labels, _ in batches:
            hidden, labels = input_ids.to(self.device), labels.to(self.device)
            row = torch.full((len(self),), float("nan"), dtype=torch.float64)
            for behind, layer in enumerate(self.layers, 1):
                hidden = layer(hidden)
                if behind in readers:
                    exit_, head = readers[behind]
                    row[exit_ - 1] = loss_fn(head(hidden), labels).double().cpu()
            row[-1] = loss_fn(hidden, labels).double().cpu()
            yield row, int((labels != -100).sum())

    def depth(self, exit_: int) -> int:
        """Decoder layers that an exit's logits have gone through, blocks of its head included."""
        if exit_ == len(self):
            return self.model.num_layers - 2
        return self.boundary(exit_) - 1 + len(self.heads[exit_].kinds)

    @torch.no_grad()
    def lazy_logits(self, input_ids: Tensor, exit_: int) -> LazyLogits:
        """An exit's logits [B, S, V], in fp32."""
        self.check(exit_)
        below, head = (self.layers[:-1], self.layers[-1])
        if exit_ < len(self):
            below, head = self.layers[: self.boundary(exit_)], self.heads[exit_]
        hidden = input_ids.to(self.device)
        for layer in below:
            hidden = layer(hidden)
        logits: LazyLogits = head(hidden)
        return logits

    def to_hugging_face(self, exit_: int | None = None) -> PreTrainedModel:
        """The whole model without the heads, or the first stages with an exit's head as a smaller model.

        Its logits are those of the exit where the model's architecture has a place for everything in the head, which
        :func:`models.hub_folder.write` finds out.

        Raises:
            ModelError: there is no such exit.
        """
        exit_ = len(self) if exit_ is None else exit_
        self.check(exit_)
        if exit_ == len(self):
            return assemble(self.config, {i: self.checkpoint.layer_state(i) for i in range(self.model.num_layers)})
        below = [self.checkpoint.layer_state(index) for index in range(self.boundary(exit_))]
        return assemble(*exit_parts(self.config, below, self.heads[exit_]))

    def _head(self, exit_: int, state: dict[str, Tensor]) -> AuxiliaryHead:
        assert self._options is not None
        head = self.model.aux_head(exit_ - 1, self._options, after=self.boundary(exit_) - 1)
        try:
            head.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ModelError(f"the head of exit {exit_} in {self.folder} doesn't fit the model: {reason}") from error
        self._ready(head)
        return head

    def _ready(self, module: nn.Module) -> nn.Module:
        return module.to(self.device).eval().requires_grad_(False)
