"""The channels of one stage: activations down, gradients up, and a link of its own for evaluation."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from ibp_deepspeed.comm.channel import ReceiveChannel, SendChannel
from ibp_deepspeed.comm.message import Header, Memory, TensorSpec

_AHEAD = 2
# A receive stays posted while all stages evaluate or write a checkpoint; torch would give NCCL 10 minutes.
_TIMEOUT = max(torch.distributed.constants.default_pg_timeout, deepspeed.constants.default_pg_timeout)


def new_pipeline_group(grid: Any, backend: str | None = None) -> dist.ProcessGroup:
    """A group of this rank's pipeline, whose group ranks are the stages; made for all pipelines on all ranks."""
    mine: dist.ProcessGroup | None = None
    for ranks in grid.topology().get_axis_comm_lists("pipe"):
        group = dist.new_group(ranks, backend=backend, timeout=_TIMEOUT)
        if grid.get_global_rank() in ranks:
            mine = group
    assert mine is not None
    return mine


class StageLinks:
    """Made at the same time on all ranks: process groups are collective.

    Args:
        grid: DeepSpeed's grid of stages and data-parallel ranks.
        device: of the hidden states.
        channel_depth: micro-batches that a stage may run ahead of what the next stage has received.
    """

    def __init__(self, grid: Any, device: torch.device, channel_depth: int) -> None:
        self.grid, self.depth, self._memory = grid, channel_depth, Memory.of(device)
        self.stage = grid.get_stage_id()
        last = grid.pipe_parallel_size - 1
        groups = {name: new_pipeline_group(grid) for name in ("activations", "gradients", "evaluation")}
        self._evaluation_group = groups["evaluation"]
        self._gradient_group = groups["gradients"]
        self.down: SendChannel | None = None
        self.up: SendChannel | None = None
        self._from_above: ReceiveChannel | None = None
        self._from_below: ReceiveChannel | None = None
        if self.stage < last:
            self.down = self._sender(groups["activations"], self.stage + 1, announce=True)
        if self.stage > 0:
            self.up = self._sender(groups["gradients"], self.stage - 1, announce=False)
            self._from_above = self._receiver(groups["activations"], self.stage - 1)

    def wait_for_credit(self) -> None:
        """Before a forward pass: wait while ``channel_depth`` micro-batches have not reached the next stage."""
        if self.down is not None:
            self.down.wait_in_flight(self.depth - 1)

    def send_activation(self, spec: TensorSpec, hidden: Tensor, header: Header) -> None:
        """Start sending h_k; the first one fixes the shape of the gradients that come back."""
        assert self.down is not None
        self.down.send(spec, hidden, header)
        if self._from_below is None:
            self._from_below = self._receiver(self._gradient_group, self.stage + 1, spec)

    def receive_activation(self) -> tuple[Tensor, Tensor]:
        """h_{k-1} and its header [3]."""
        assert self._from_above is not None
        return self._from_above.take()

    def send_gradient(self, gradient: Tensor, header: Header) -> None:
        """Start sending dL/dh_{k-1}."""
        assert self.up is not None
        self.up.send(TensorSpec(tuple(gradient.shape), gradient.dtype), gradient, header)

    def receive_gradient(self) -> tuple[Tensor, Tensor]:
        """dL/dh_k and its header [3]."""
        assert self._from_below is not None
        return self._from_below.take()

    def flush(self, timeout: float | None) -> None:
        """Wait until everything sent has been received, or ``timeout`` seconds."""
        for channel in (self.down, self.up):
            if channel is not None:
                channel.wait_in_flight(0, timeout)

    def close(self) -> None:
        """End the background threads; nothing can be sent any more."""
        for channel in (self.down, self.up):
            if channel is not None:
                channel.close()

    def evaluation_link(self) -> EvaluationLink:
        """Channels for one evaluation, which may have another shape than training."""
        return EvaluationLink(
            self._sender(self._evaluation_group, self.stage + 1, announce=True)
            if self.stage + 1 < self.grid.pipe_parallel_size
            else None,
            self._receiver(self._evaluation_group, self.stage - 1, ahead=0) if self.stage else None,
        )

    def _sender(self, group: dist.ProcessGroup, stage: int, *, announce: bool) -> SendChannel:
        name = f"{self._kind(group)} from stage {self.stage} to stage {stage}"
        return SendChannel(group, self.grid.stage_to_global(stage), self._memory, name, announce=announce)

    def _receiver(
        self, group: dist.ProcessGroup, stage: int, spec: TensorSpec | None = None, ahead: int | None = None
    ) -> ReceiveChannel:
        name = f"{self._kind(group)} from stage {stage} to stage {self.stage}"
        ahead = min(_AHEAD, self.depth) if ahead is None else ahead
        return ReceiveChannel(group, self.grid.stage_to_global(stage), self._memory, name, ahead=ahead, spec=spec)

    def _kind(self, group: dist.ProcessGroup) -> str:
        if group is self._evaluation_group:
            return "evaluation activations"
        return "gradients" if group is self._gradient_group else "activations"


class EvaluationLink:
    """Activations of one evaluation, without running ahead."""

    def __init__(self, down: SendChannel | None, above: ReceiveChannel | None) -> None:
        self._down, self._above = down, above

    def send(self, spec: TensorSpec, hidden: Tensor, header: Header) -> None:
        """Send h_k and wait until the next stage has it."""
        assert self._down is not None
        self._down.send(spec, hidden, header)
        self._down.wait_in_flight(0)

    def receive(self) -> tuple[Tensor, Tensor]:
        """h_{k-1} and its header [3]."""
        assert self._above is not None
        return self._above.take()

    def close(self) -> None:
        """End the background thread."""
        if self._down is not None:
            self._down.close()
