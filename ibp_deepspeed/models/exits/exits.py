"""All exits of a trained model in one process: every head and the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.models.cut_model import count_parameters
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.exits.memory import Memory
from ibp_deepspeed.models.exits.passage import Passage
from ibp_deepspeed.models.hf.assemble import assemble, exit_parts
from ibp_deepspeed.models.runs.checkpoint import Checkpoint
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss, LazyLogits
from ibp_deepspeed.objectives.evaluation import ExitMeans
from ibp_deepspeed.objectives.head import Objective, last_objective
from ibp_deepspeed.strategy.head_placement import HeadPlacement

Watch = Callable[[int, LazyLogits, Tensor], None]
"""Takes an exit, its logits [B, S, V], and the labels [B, S]."""

P = TypeVar("P")


class Exits:
    """A checkpoint's model with its K exits, on one device. Exit k is behind the first k stages; exit K is the model.

    Layers and heads are read when they are asked for. They are kept if the model takes no more than half of the
    memory; of a larger one each is let go when it has been used.

    Args:
        path: the checkpoint, see :class:`ibp_deepspeed.models.checkpoint.Checkpoint`.
        device: where the layers go.
        dtype: of layers and heads; None: the one that they were trained in, as the training's own evaluation has it.
        memory_gib: what there is for the model; None: what the device has free when the first layer is asked for.

    Raises:
        ModelError: a file that is missing or does not fit.
    """

    def __init__(
        self,
        path: str | Path,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype | None = None,
        memory_gib: float | None = None,
    ) -> None:
        self.checkpoint = Checkpoint(path)
        self.folder, self.description = self.checkpoint.folder, self.checkpoint.description
        if self.description.images is not None:
            raise ModelError(f"{self.folder} is of an image classifier: evaluate_vision.py reads and exports it.")
        self.interlocking = InterlockingConfig.parse(self.description.interlocking)
        self.placement = HeadPlacement.from_config(self.interlocking, len(self), self.interlocking.aux_head is not None)
        self.hf_config = self.description.hf_config()
        self.device, self.memory_gib, self._dtype = torch.device(device), memory_gib, dtype
        self._kept: dict[str, Any] = {}

    def __len__(self) -> int:
        """K."""
        return len(self.description.bounds) - 1

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of layers and heads."""
        return self._dtype or self.checkpoint.stored_dtype

    def in_full_precision(self) -> Exits:
        """The same exits in fp32, to compare what was written with."""
        if self.dtype == torch.float32:
            return self
        return Exits(self.folder, self.device, dtype=torch.float32, memory_gib=self.memory_gib)

    @cached_property
    def model(self) -> CausalLM:
        """What builds the layers."""
        return CausalLM(self.hf_config, weights=self.checkpoint, dtype=self.dtype)

    @cached_property
    def memory(self) -> Memory:
        """What there is for the model."""
        return Memory.of(self.device, self.memory_gib)

    @cached_property
    def is_streamed(self) -> bool:
        """Whether the model is too large to be held: one layer or head is, at a time."""
        heads = sum(count_parameters(objective.module) for objective in self.objectives.values())
        return not self.memory.holds((sum(self.model.parameter_counts()) + heads) * self.dtype.itemsize)

    @cached_property
    def objectives(self) -> dict[int, Objective]:
        """Exit (1 … K) → its objective: those whose head the checkpoint has, without weights, and the model's own."""
        found = {loss + 1: self._outline(loss + 1) for loss in self.placement.heads if self._has_head(loss + 1)}
        return {**found, len(self): last_objective().configured(None, CausalLMLoss())}

    def layer(self, index: int) -> nn.Module:
        """Pipeline layer ``index``."""
        return self._part(f"layer {index}", lambda: self._ready(self.model.build_layer(index)))

    def objective(self, exit_: int) -> Objective:
        """That of an exit with its head's weights.

        Raises:
            ModelError: they don't fit the model.
        """
        if exit_ == len(self):
            return self.objectives[exit_]
        return self._part(f"head {exit_}", lambda: self._with_head(exit_))

    def boundary(self, exit_: int) -> int:
        """The pipeline layer before which an exit's head stands."""
        return self.placement.boundary(exit_ - 1, self.description.bounds)

    def check(self, exit_: int) -> None:
        """Raises a ModelError when there is no such exit."""
        if exit_ not in self.objectives:
            there = ", ".join(map(str, self.objectives))
            raise ModelError(f"{self.folder} has no exit {exit_}: its exits are {there} (the last one is the model).")

    @torch.no_grad()
    def eval_batch(
        self, data_iter: Iterator[tuple[Tensor, ...]], num_micro_batches: int, watch: Watch | None = None
    ) -> Tensor:
        """Held-out losses of the K exits as a pipeline's ``eval_batch`` gives them, NaN where there is no head. [K]

        A model that is not held goes over as many micro-batches at once as have hidden states in the memory.

        ``watch`` is shown each micro-batch's logits and labels, of every exit in the micro-batches' order.
        """
        means = ExitMeans(len(self))

        def seen(exit_: int, logits: LazyLogits, labels: Tensor) -> None:
            objective = self.objectives[exit_]
            means.add({exit_ - 1: objective.measure(logits, labels)}, {exit_ - 1: objective.weight(labels)})
            if watch is not None:
                watch(exit_, logits, labels)

        passages = (Passage.of(micro_batch, self.device) for micro_batch in islice(data_iter, num_micro_batches))
        for group in self._groups(passages):
            self._through(group, seen)
        return means.means()

    def _groups(self, passages: Iterator[Passage]) -> Iterator[list[Passage]]:
        if not self.is_streamed:
            return ([passage] for passage in passages)
        return self.memory.groups(passages, self.model.hidden_size * self.dtype.itemsize)

    def _through(self, group: list[Passage], seen: Watch) -> None:
        """All exits of a group; no name here holds a layer or a head longer than it is used."""
        exits = {self.boundary(exit_): exit_ for exit_ in self.objectives if exit_ < len(self)}
        last = self.model.num_layers - 1
        for index in range(last):
            self._advance(group, self.layer(index))
            if index + 1 in exits:
                exit_ = exits[index + 1]
                self._read_out(group, exit_, self.objective(exit_).outputs, seen)
        self._read_out(group, len(self), self.layer(last), seen)

    def _advance(self, group: list[Passage], layer: nn.Module) -> None:
        for passage in group:
            passage.hidden = passage.run(layer)
            if self.is_streamed:
                passage.forget_masks()

    def _read_out(self, group: list[Passage], exit_: int, head: Callable[[Tensor], LazyLogits], seen: Watch) -> None:
        for passage in group:
            seen(exit_, passage.run(head), passage.labels)
            if self.is_streamed:
                passage.forget_masks()

    def shared_layers(self, exit_: int) -> int:
        """Decoder layers of an exit that are the model's first ones; behind them are blocks of its head."""
        return self.model.num_layers - 2 if exit_ == len(self) else self.boundary(exit_) - 1

    def depth(self, exit_: int) -> int:
        """Decoder layers that an exit's logits have gone through, blocks of its head included."""
        if exit_ == len(self):
            return self.model.num_layers - 2
        return self.shared_layers(exit_) + self.objectives[exit_].inner_layers

    @torch.no_grad()
    def lazy_logits(self, input_ids: Tensor, exit_: int) -> LazyLogits:
        """An exit's logits [B, S, V] of the documents at hand."""
        self.check(exit_)
        hidden = input_ids.to(self.device)
        for index in range(self.boundary(exit_) if exit_ < len(self) else self.model.num_layers):
            hidden = self.layer(index)(hidden)
        logits: LazyLogits = self.objective(exit_).outputs(hidden)
        return logits

    def as_model(self, exit_: int | None = None) -> tuple[PretrainedConfig, Iterator[Mapping[str, Tensor]]]:
        """The whole model without the heads, or the first stages with an exit's head as a smaller model.

        Returns:
            its config, and the state dicts of its pipeline layers, each read when it is taken.

        Raises:
            ModelError: there is no such exit.
        """
        exit_ = len(self) if exit_ is None else exit_
        self.check(exit_)
        if exit_ == len(self):
            return self.hf_config, map(self.checkpoint.layer_state, range(self.model.num_layers))
        below = self.boundary(exit_)
        # in fp32, whatever the dtype: what is in the head is folded into its LM head, and then rounded once
        head = self._with_head(exit_, torch.float32).as_layers()
        return exit_parts(self.hf_config, map(self.checkpoint.layer_state, range(below)), below, head)

    def to_hugging_face(self, exit_: int | None = None) -> PreTrainedModel:
        """What :meth:`as_model` gives as a model.

        Its logits are those of the exit where the model's architecture has a place for everything in the head, which
        :func:`ibp_deepspeed.models.hub_folder.write` finds out.

        Raises:
            ModelError: there is no such exit.
        """
        hf_config, states = self.as_model(exit_)
        return assemble(hf_config, dict(enumerate(states)))

    def _has_head(self, exit_: int) -> bool:
        return self.checkpoint.has_head(self.boundary(exit_))

    def _outline(self, exit_: int) -> Objective:
        options = self.interlocking.aux_head
        assert options is not None
        objective = self.model.empty_objective(options, after=self.boundary(exit_) - 1)
        return objective.configured(options, CausalLMLoss())

    def _with_head(self, exit_: int, dtype: torch.dtype | None = None) -> Objective:
        objective, state = self._outline(exit_), self.checkpoint.head_state(self.boundary(exit_)) or {}
        cast = {n: t.to(dtype or self.dtype, copy=True) if t.is_floating_point() else t for n, t in state.items()}
        try:
            objective.module.load_state_dict(cast, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ModelError(f"the head of exit {exit_} in {self.folder} doesn't fit the model: {reason}") from error
        self._ready(objective.module, dtype)
        return objective

    def _part(self, name: str, build: Callable[[], P]) -> P:
        if self.is_streamed:
            return build()
        if name not in self._kept:
            self._kept[name] = build()
        kept: P = self._kept[name]
        return kept

    def _ready(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """As the engine has it: buffers are in 16 bits too where parameters are."""
        dtype = dtype or self.dtype
        return module.to(self.device, dtype if dtype.itemsize == 2 else None).eval().requires_grad_(False)
