"""Wrong input and failing stages: what each rank says, and that all of them end."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

from ibp_deepspeed import InterlockedPipelineModule, cli, initialize
from ibp_deepspeed.engine import watchdog
from tests.toys import Head, Layer, layer_specs, loss_fn, make_module, micro_batches
from tests.workers.late_targets import Outputs, Towards
from tests.workers.slow_layers import module_of

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 3,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "interlocking": {"strategy": "pairwise"},
}
WAITING: dict[str, Any] = {
    **CONFIG,
    "interlocking": {
        "strategy": "local",
        "channel_depth": 60,
        "aux_head": {"readout": "shared", "refresh_interval": 2, "refresh_delay": 0},
    },
}
FOLLOWED: dict[str, Any] = {
    **CONFIG,
    "interlocking": {
        "strategy": "local",
        "channel_depth": 60,
        "aux_head": {"objective": {"name": "momentum", "interval": 2, "delay": 0}},
    },
}

LATE: dict[str, Any] = {"strategy": "local", "channel_depth": 60}
UNWATCHED: dict[str, Any] = {**CONFIG, "interlocking": {"strategy": "pairwise", "watchdog_seconds": 0}}
WATCHED: dict[str, Any] = {**CONFIG, "interlocking": {"strategy": "pairwise", "watchdog_seconds": 3.0}}


class Misbehaving(Layer):
    """A layer that does something wrong on its stage."""

    def __init__(self, seed: int, act: Callable[[Tensor], Any]) -> None:
        super().__init__(seed)
        self.act = act

    def forward(self, hidden: Tensor) -> Any:
        return self.act(super().forward(hidden))


def module_with(layer: Any, stages: int = 4, at: int = 3) -> InterlockedPipelineModule:
    specs: list[Any] = layer_specs(stages, torch.float32)
    specs[at] = layer
    return InterlockedPipelineModule(
        specs, num_stages=stages, loss_fn=loss_fn, aux_head=lambda k: Head(100 + k), partition_method="uniform"
    )


def late_module() -> InterlockedPipelineModule:
    """Heads that learn from the next exit one batch later."""
    late = Outputs(tokens=3, delay=1)
    return InterlockedPipelineModule(
        layer_specs(4, torch.float32),
        num_stages=4,
        loss_fn=loss_fn,
        aux_head=lambda k: Towards(Head(100 + k), late=late),
        partition_method="uniform",
    )


def train(
    module: InterlockedPipelineModule,
    phase: cli.SameOnAllRanks,
    data: Iterator[Any] | None = None,
    config: dict[str, Any] = CONFIG,
) -> None:
    engine = initialize(model=module, config=config)[0]
    phase.ends()
    for step in range(4):
        engine.train_batch(data or iter(micro_batches(step, 3)))
    engine.close()


def raising() -> Callable[[Tensor], Tensor]:
    calls: list[int] = []

    def act(hidden: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 5:  # the second micro-batch of the second batch
            raise ValueError("a layer of this stage broke")
        return hidden

    return act


def after(calls: int, act: Callable[[], None]) -> Callable[[Tensor], Tensor]:
    """Do something in the forward pass after that many."""
    left = [calls]

    def pass_on(hidden: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            act()
        return hidden

    return pass_on


def after_batches(batches: int, act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Do something to what a layer gives, from that batch on (three micro-batches each)."""
    calls = itertools.count()
    return lambda hidden: act(hidden) if next(calls) >= 3 * batches else hidden


def for_ever() -> None:
    while True:
        time.sleep(0.1)


def stop() -> None:
    """Stop this process, when its watchdog has said where it is."""
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGSTOP)


def slow_once() -> Callable[[Tensor], Tensor]:
    """Three seconds in the fifth forward pass, which count as more than a minute."""
    watchdog._TELL, watchdog._BEAT = 1.0, 0.2
    calls = itertools.count()

    def act(hidden: Tensor) -> Tensor:
        if next(calls) == 4:
            time.sleep(3)
        return hidden

    return act


def hanging_data(rank: int) -> Iterator[Any]:
    """Data that ends for stage 2 without an end."""
    yield from micro_batches(0, 3)
    if rank == 2:
        for_ever()
    yield from itertools.cycle(micro_batches(1, 3))


def cases(phase: cli.SameOnAllRanks) -> dict[str, Callable[[], None]]:
    rank = deepspeed.comm.get_rank()
    other = [(x, y + rank // 2) for x, y in micro_batches(0, 3)]  # stages 0 and 1 agree, 2 and 3 agree
    tied = [
        TiedLayerSpec("embedding", Layer, 0),
        *layer_specs(4, torch.float32)[1:-1],
        TiedLayerSpec("embedding", Layer, 0),
    ]
    headless = InterlockedPipelineModule
    return {
        "raises": lambda: train(module_with(LayerSpec(Misbehaving, 3, raising())), phase),
        "two tensors": lambda: train(module_with(LayerSpec(Misbehaving, 3, lambda h: (h, h))), phase),
        "integers": lambda: train(module_with(LayerSpec(Misbehaving, 3, lambda h: h.long())), phase),
        "other samples": lambda: train(make_module(4), phase, itertools.cycle(other)),
        "other samples in a dictionary": lambda: train(make_module(4), phase, dictionaries(rank)),
        "smaller micro-batch": lambda: train(make_module(4), phase, iter([*micro_batches(0, 3), smaller()])),
        "nothing to train": lambda: train(make_module(4).requires_grad_(False), phase),
        "data ends": lambda: train(make_module(4), phase, iter(micro_batches(0, 3))),
        "tied": lambda: train(
            headless(tied, num_stages=4, loss_fn=loss_fn, aux_head=lambda k: Head(k), partition_method="uniform"), phase
        ),
        "no heads": lambda: train(make_module(4, heads=False), phase),
        "stages": lambda: train(make_module(3), phase),
        "layers": lambda: train(
            InterlockedPipelineModule([nn.Linear(2, 2)] * 3, num_stages=4, loss_fn=loss_fn, aux_head=None), phase
        ),
        "two configs": lambda: train(make_module(4, {"strategy": "local"}), phase),
        "layer hangs": lambda: train(module_with(LayerSpec(Misbehaving, 3, after(4, for_ever))), phase, config=WATCHED),
        "process stops": lambda: train(module_with(LayerSpec(Misbehaving, 3, after(4, stop))), phase, config=WATCHED),
        "layer is slow": lambda: train(module_with(LayerSpec(Misbehaving, 3, slow_once())), phase, config=UNWATCHED),
        "loader hangs": lambda: train(make_module(4), phase, hanging_data(rank), WATCHED),
        "last stage dies": lambda: train(make_module(4, follow=True), phase, dying_data(rank), WAITING),
        "next exit dies": lambda: train(late_module(), phase, dying_data(rank), {**CONFIG, "interlocking": LATE}),
        "followed stage dies": lambda: train(module_of({**FOLLOWED, "stages": 4}), phase, dying_data(rank), FOLLOWED),
        "infinite loss": lambda: train(
            module_with(LayerSpec(Misbehaving, 3, after_batches(1, lambda h: h * torch.inf))),
            phase,
            config={**CONFIG, "interlocking": {"strategy": "local"}},
        ),
        "another engine": lambda: deepspeed.initialize(model=make_module(4), config=CONFIG),
        "scalar parameter": lambda: train(module_with(LayerSpec(Scalar)), phase),
    }


def dictionaries(rank: int) -> Iterator[Any]:
    """Sample ids of which one element in the middle of many differs on stages 2 and 3."""
    for x, y in itertools.cycle(micro_batches(0, 3)):
        more = torch.zeros(4096)
        more[2000] = rank // 2
        yield x, y, {"ids": more}


def smaller() -> tuple[Tensor, Tensor]:
    """The rest of an epoch."""
    x, y = micro_batches(1, 1)[0]
    return x[:2], y[:2]


def dying_data(rank: int) -> Iterator[Any]:
    """Data of which the last stage dies at the end of the first batch, while others wait for its next readout."""
    yield from micro_batches(0, 3)
    if rank == 3:
        time.sleep(2)
        os._exit(7)
    yield from itertools.cycle(micro_batches(1, 3))


class Scalar(nn.Module):
    """A parameter without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.scale


def main(phase: cli.SameOnAllRanks, case: str) -> None:
    cases(phase)[case]()
