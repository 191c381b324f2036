"""A stage that is killed, leaves, loses its connections, raises or sends what it should not, in the second batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import deepspeed
import torch
from torch import Tensor

from ibp_deepspeed import InterlockedPipelineModule, cli, initialize
from ibp_deepspeed.comm.message import META_LENGTH, TensorSpec
from tests.faults import ACTS, at
from tests.toys import Head, layer_specs, loss_fn, micro_batches

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 3,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "interlocking": {"strategy": "pairwise", "watchdog_seconds": 20.0},
}
FIFTH = 4
"""The second micro-batch of the second batch, counted from 0."""


class BrokenHead(Head):
    """Raises in its fifth forward pass."""

    calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > FIFTH:
            raise ValueError("broken on purpose")
        return super().forward(hidden)


def broken_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """As the loss function, for finite labels."""
    if not bool(labels.isfinite().all()):
        raise ValueError("broken on purpose")
    return loss_fn(outputs, labels)


def module(case: dict[str, Any]) -> InterlockedPipelineModule:
    stages = case["stages"]
    return InterlockedPipelineModule(
        layer_specs(stages, torch.float32),
        num_stages=stages,
        loss_fn=broken_loss,
        aux_head=lambda k: (BrokenHead if case["fault"] == "head" and k == case["rank"] else Head)(100 + k),
        partition_method="uniform",
    )


def data(case: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches, of which the fifth is not there, or has a label that the loss can't take, on the faulty rank."""
    faulty = case["rank"] == deepspeed.comm.get_rank()
    for number in itertools.count():
        inputs, labels = micro_batches(number // 3, 3)[number % 3]
        if faulty and number == FIFTH and case["fault"] == "loader":
            raise ValueError("broken on purpose")
        yield inputs, labels * torch.inf if faulty and number == FIFTH and case["fault"] == "loss" else labels


def main(phase: cli.SameOnAllRanks, case: dict[str, Any]) -> None:
    engine: Any = initialize(model=module(case), config=CONFIG)[0]
    if case["fault"] in ACTS:
        where = {"rank": case["rank"], "batch": 2, "instruction": case["instruction"]}
        engine.before_instruction = at(ACTS[case["fault"]], **where)
    if case["fault"] == "header" and case["rank"] == engine.global_rank:
        send = engine.links.send_activation
        engine.links.send_activation = lambda spec, hidden, header: send(spec, hidden, (header[0] * 7, *header[1:]))
    if case["fault"] == "shape" and case["rank"] == engine.global_rank:
        mock.patch.object(TensorSpec, "encode", lambda spec: torch.full((META_LENGTH,), 77)).start()
    phase.ends()
    rows = data(case)
    for _ in range(4):
        engine.train_batch(rows)
    engine.close()
