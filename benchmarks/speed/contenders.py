"""The systems that are compared, made of the same layers and trained with the same data.

Ours: ``N=1``, ``N=2``, …: a loss on every stage, at that width; ``G=2``, …: a loss on every G-th stage and
``N = 1``, modules of G stages; ``B-W``: backpropagation, input gradients first; ``sum``: all exits. A name may end
in ``fused`` (B and W in one) and in ``slack 1``. Peers: ``1F1B``, ``DualPipeV``: DeepSpeed's engines; ``ZBV``, ``ZB1``:
torch's zero-bubble schedules with two chunks a rank, in a V and interleaved; ``2BW``: asynchronous 1F1B, which never
drains (PipeDream-2BW).

Each has ``train_batch(data_iter)``; every rank is given the data.
"""

from __future__ import annotations

from collections import deque
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
        interlocking: options of ours beside what their names say.
    """

    layers: list[Callable[[], nn.Module]]
    head: Callable[[], nn.Module]
    loss_fn: Loss
    settings: dict[str, Any] = field(default_factory=dict)
    interlocking: dict[str, Any] = field(default_factory=dict)


PEERS = ("1F1B", "DualPipeV", "ZBV", "ZB1", "2BW")


def interlocking(name: str, stages: int) -> dict[str, Any]:
    """What one of our contenders is, as a configuration for K stages."""
    kind, *options = name.split()
    block: dict[str, Any] = {"backward": "fused" if "fused" in options else "split"}
    if "slack" in options:
        block["hop_slack"] = int(options[options.index("slack") + 1])
    if kind.startswith("N="):
        return {"strategy": "nwise", "width": int(kind[2:]), **block}
    if kind.startswith("G="):
        return {"strategy": "local", "exits": int(kind[2:]), **block}
    if kind == "B-W":
        return {"strategy": "global", "exits": stages, **block}
    return {"strategy": "global", "mode": kind, **block}


def applies(name: str, stages: int, micro_batches: int) -> bool:
    """Whether a contender can run with K stages and M micro-batches."""
    kind = name.split()[0]
    if kind[:2] in ("N=", "G="):
        return int(kind[2:]) < stages
    if kind == "ZB1":
        return micro_batches % stages == 0
    return kind not in ("DualPipeV", "ZBV") or micro_batches >= 2 * stages


def make(name: str, model: Model, stages: int, micro_batches: int, batch: int = 1) -> Contender:
    """A contender, on all ranks together."""
    import deepspeed
    from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule

    from ibp_deepspeed import InterlockedPipelineModule, initialize

    if name in ("ZBV", "ZB1"):
        return TorchZeroBubble(model, stages, micro_batches, v=name == "ZBV")
    if name == "2BW":
        return Asynchronous(model, stages, micro_batches, batch)
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
    config["interlocking"] = {**interlocking(name, stages), **model.interlocking}
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
    """``torch.distributed.pipelining``'s: two chunks of the model a rank; weight gradients fill bubbles."""

    def __init__(self, model: Model, stages: int, micro_batches: int, *, v: bool) -> None:
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble

        rank, chunks = dist.get_rank(), 2 * stages
        share = len(model.layers) // chunks
        places = (rank, chunks - 1 - rank if v else rank + stages)
        self._micro_batches, self._first, self._last = micro_batches, rank == 0, chunks - 1 in places
        modules = []
        for chunk in places:
            layers = model.layers[chunk * share : (chunk + 1) * share]
            modules.append(nn.Sequential(*(make_layer() for make_layer in layers)))
        device = torch.device("cpu")
        parts: list[Any] = [PipelineStage(m, i, chunks, device) for m, i in zip(modules, places, strict=True)]
        # Before its first step torch 2.11 sends to all neighbours, at the turn of the V to the rank itself, which gloo
        # refuses; gloo needs no such start, and torch 2.12 and newer don't call this.
        for part in parts:
            part._get_init_p2p_neighbors_ops = list
        kind = ScheduleZBVZeroBubble if v else ScheduleInterleavedZeroBubble
        self._schedule = kind(parts, micro_batches, loss_fn=model.loss_fn)
        self._optimizer = torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.0)

    def train_batch(self, data_iter: Iterator[Batch]) -> None:
        """Train on the next M micro-batches."""
        rows = list(islice(data_iter, self._micro_batches))
        inputs, labels = (torch.cat(column) for column in zip(*rows, strict=True))
        targets: dict[str, Any] = {"target": labels, "losses": []} if self._last else {}
        self._schedule.step(*([inputs] if self._first else []), **targets)
        self._optimizer.step()
        self._optimizer.zero_grad()


class Asynchronous:
    """1F1B that never drains, as PipeDream-2BW runs it: the first micro-batches of a batch follow the last ones of the
    batch before, and a stage steps as soon as it has a batch's gradients.

    For times: one optimizer a stage steps where 2BW's would, but the second set of weights is not kept, so that what it
    learns is not 2BW's.
    """

    def __init__(self, model: Model, stages: int, micro_batches: int, batch: int) -> None:
        rank, share = dist.get_rank(), len(model.layers) // stages
        self._rank, self._stages, self._count, self._loss = rank, stages, micro_batches, model.loss_fn
        self._down, self._up = dist.new_group(), dist.new_group()
        self._module = nn.Sequential(*(make_layer() for make_layer in model.layers[rank * share : (rank + 1) * share]))
        self._optimizer = torch.optim.SGD(self._module.parameters(), lr=0.0)
        self._in_flight: deque[tuple[Tensor, Tensor]] = deque()
        self._sent: deque[tuple[Any, Tensor]] = deque()

    def train_batch(self, data_iter: Iterator[Batch]) -> None:
        """Train on the next M micro-batches; the first call starts those that are in flight from then on."""
        while len(self._in_flight) < self._stages - 1 - self._rank:
            self._forward(next(data_iter))
        for _ in range(self._count):
            self._forward(next(data_iter))
            self._backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _forward(self, row: Batch) -> None:
        inputs, labels = row
        if self._rank:
            inputs = torch.empty_like(inputs)
            dist.recv(inputs, self._rank - 1, group=self._down)
        outputs = self._module(inputs.requires_grad_(self._rank > 0))
        if self._rank < self._stages - 1:
            self._send(outputs.detach(), self._rank + 1, self._down)
        else:
            outputs = self._loss(outputs, labels) / self._count
        self._in_flight.append((inputs, outputs))

    def _backward(self) -> None:
        inputs, outputs = self._in_flight.popleft()
        gradient = None
        if self._rank < self._stages - 1:
            gradient = torch.empty_like(outputs)
            dist.recv(gradient, self._rank + 1, group=self._up)
        outputs.backward(gradient)
        if self._rank:
            assert inputs.grad is not None
            self._send(inputs.grad, self._rank - 1, self._up)

    def _send(self, tensor: Tensor, to: int, group: Any) -> None:
        """Without waiting; what was sent long ago has arrived."""
        self._sent.append((dist.isend(tensor, to, group=group), tensor))
        while len(self._sent) > 4 * self._stages:
            self._sent.popleft()[0].wait()
