"""The systems that are compared, made of the same layers and trained with the same data.

``N=1``, ``N=2``, …: this engine at that width. ``1F1B``, ``DualPipeV``: DeepSpeed's engines. ``ZBV``: torch's
zero-bubble schedule. Each has ``train_batch(data_iter)``; every rank is given the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Any, Tensor], Tensor]


class Contender(Protocol):
    """What is timed."""

    def train_batch(self, data_iter: Iterator[Batch]) -> Any:
        """Train on the next M micro-batches."""
        ...


@dataclass(frozen=True)
class Model:
    """What all contenders train.

    Attributes:
        layers: makers of the model's layers, first to last; at least two a stage, in stages of equal length.
        head: maker of a stage's auxiliary head.
        loss_fn: of outputs and labels.
        settings: DeepSpeed configuration beside the batch size.
        interlocking: options beside the width.
    """

    layers: list[Callable[[], nn.Module]]
    head: Callable[[], nn.Module]
    loss_fn: Loss
    settings: dict[str, Any] = field(default_factory=dict)
    interlocking: dict[str, Any] = field(default_factory=dict)


def applies(name: str, stages: int, micro_batches: int) -> bool:
    """Whether a contender can run with K stages and M micro-batches."""
    if name.startswith("N="):
        return int(name[2:]) < stages
    return name not in ("DualPipeV", "ZBV") or micro_batches >= 2 * stages


def make(name: str, model: Model, stages: int, micro_batches: int, batch: int = 1) -> Contender:
    """A contender, on all ranks together."""
    import deepspeed
    from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule

    from ibp_deepspeed import InterlockedPipelineModule, initialize

    if name == "ZBV":
        return TorchZeroBubble(model, stages, micro_batches)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        **model.settings,
    }
    layers = [LayerSpec(_Made, make_layer) for make_layer in model.layers]
    common: dict[str, Any] = {"num_stages": stages, "loss_fn": model.loss_fn, "partition_method": "uniform"}
    if name in ("1F1B", "DualPipeV"):
        kind = PipelineModule if name == "1F1B" else DualPipeVModule
        return deepspeed.initialize(model=kind(layers, **common), config=config)[0]
    config["interlocking"] = {"strategy": "nwise", "width": int(name[2:]), **model.interlocking}
    module = InterlockedPipelineModule(
        layers, aux_head=lambda stage: model.head(), interlocking=config["interlocking"], **common
    )
    return initialize(model=module, config=config)[0]


class _Made(nn.Module):
    """A layer made by a function, for LayerSpec, which wants a class."""

    def __init__(self, make_layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layer = make_layer()

    def forward(self, inputs: Any) -> Any:
        return self.layer(inputs)


class TorchZeroBubble:
    """``torch.distributed.pipelining``'s ZBV: two chunks of the model a rank, in a V; weight gradients fill bubbles."""

    def __init__(self, model: Model, stages: int, micro_batches: int) -> None:
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

        rank, chunks = dist.get_rank(), 2 * stages
        share = len(model.layers) // chunks
        self._micro_batches, self._first = micro_batches, rank == 0
        modules = []
        for chunk in (rank, chunks - 1 - rank):
            layers = model.layers[chunk * share : (chunk + 1) * share]
            modules.append(nn.Sequential(*(make_layer() for make_layer in layers)))
        device = torch.device("cpu")
        places = (rank, chunks - 1 - rank)
        parts: list[Any] = [PipelineStage(m, i, chunks, device) for m, i in zip(modules, places, strict=True)]
        # Before its first step torch 2.11 sends to all neighbours, at the turn of the V to the rank itself, which gloo
        # refuses; gloo needs no such start, and torch 2.12 and newer don't call this.
        for part in parts:
            part._get_init_p2p_neighbors_ops = list
        self._schedule = ScheduleZBVZeroBubble(parts, micro_batches, loss_fn=model.loss_fn)
        self._optimizer = torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.0)

    def train_batch(self, data_iter: Iterator[Batch]) -> None:
        """Train on the next M micro-batches."""
        rows = list(islice(data_iter, self._micro_batches))
        if self._first:
            inputs, labels = (torch.cat(column) for column in zip(*rows, strict=True))
            self._schedule.step(inputs, target=labels, losses=[])
        else:
            self._schedule.step()
        self._optimizer.step()
        self._optimizer.zero_grad()
