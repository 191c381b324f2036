"""The channels of one stage: activations down, gradients up, and a link of its own for evaluation."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ibp_deepspeed.comm.announced_channel import AnnouncedReceiveChannel, AnnouncedSendChannel, Wire
from ibp_deepspeed.comm.channel import ReceiveChannel, SendChannel
from ibp_deepspeed.comm.link_groups import Kind, group_of, make_groups, new_host_group
from ibp_deepspeed.comm.message import Header, Memory, TensorSpec
from ibp_deepspeed.comm.sender import Sender
from ibp_deepspeed.comm.waits import Waits

_AHEAD = 2
_TAGS = {kind: 2 * number for number, kind in enumerate(Kind)}

Receiver = ReceiveChannel | AnnouncedReceiveChannel


class StageLinks:
    """Made at the same time on all ranks: process groups are collective.

    Over NCCL messages are announced before they are posted (announced_channel.py). Over gloo, where a posted receive
    occupies nothing, receives are posted ahead (channel.py).

    Args:
        grid: DeepSpeed's grid of stages and data-parallel ranks.
        device: of the hidden states.
        channel_depth: micro-batches that a stage may run ahead of what the next stage has received.

    Attributes:
        waits: how long this stage has waited for training's messages and credit.
    """

    def __init__(self, grid: Any, device: torch.device, channel_depth: int) -> None:
        self.grid, self.depth, self._device, self._memory = grid, channel_depth, device, Memory.of(device)
        self.stage, self._last = grid.get_stage_id(), grid.pipe_parallel_size - 1
        self.waits = Waits()
        self._groups = make_groups(grid)
        self._control = new_host_group() if dist.get_backend() == "nccl" else None
        self.down: Sender | None = None
        self.up: Sender | None = None
        self._from_above: Receiver | None = None
        self._from_below: Receiver | None = None
        if self.stage < self._last:
            self.down = self._sender(Kind.ACTIVATIONS, self.stage + 1, announce=True)
        if self.stage > 0:
            self.up = self._sender(Kind.GRADIENTS, self.stage - 1, announce=False)
            self._from_above = self._receiver(Kind.ACTIVATIONS, self.stage - 1)

    def wait_for_credit(self) -> None:
        """Before a forward pass: wait while ``channel_depth`` micro-batches have not reached the next stage."""
        if self.down is not None:
            down = self.down
            self.waits.during("credit", lambda: down.wait_in_flight(self.depth - 1))

    def send_activation(self, spec: TensorSpec, hidden: Tensor, header: Header) -> None:
        """Start sending h_k; the first one fixes the shape of the gradients that come back."""
        assert self.down is not None
        self.down.send(spec, hidden, header)
        if self._from_below is None:
            self._from_below = self._receiver(Kind.GRADIENTS, self.stage + 1, spec)

    def receive_activation(self) -> tuple[Tensor, Header]:
        """h_{k-1} and its header."""
        assert self._from_above is not None
        return self.waits.during("activations", self._from_above.take)

    def send_gradient(self, gradient: Tensor, header: Header) -> None:
        """Start sending dL/dh_{k-1}."""
        assert self.up is not None
        self.up.send(TensorSpec(tuple(gradient.shape), gradient.dtype), gradient, header)

    def receive_gradient(self) -> tuple[Tensor, Header]:
        """dL/dh_k and its header."""
        assert self._from_below is not None
        return self.waits.during("gradients", self._from_below.take)

    def has_activation(self) -> bool:
        """Whether :meth:`receive_activation` would return at once."""
        return self._from_above is None or self._from_above.is_here()

    def has_gradient(self) -> bool:
        """Whether :meth:`receive_gradient` would return at once."""
        return self._from_below is None or self._from_below.is_here()

    def flush(self, timeout: float | None) -> None:
        """Wait until everything sent has been received, or ``timeout`` seconds."""
        for channel in (self.down, self.up):
            if channel is not None:
                channel.wait_in_flight(0, timeout)

    def close(self, *, wait: bool = True) -> None:
        """End the background threads; nothing can be sent any more.

        Args:
            wait: for the neighbours' last words; not after a failure, when they may never come. What is posted then is
                given up, so that the process can end.
        """
        if not wait:
            for group in self._groups.values() if self._control is not None else ():
                dist.distributed_c10d._abort_process_group(group)
            return
        for channel in (self.down, self.up):
            if channel is not None:
                channel.close()
        for receiver in (self._from_above, self._from_below):
            if isinstance(receiver, AnnouncedReceiveChannel):
                receiver.close()

    def evaluation_link(self) -> EvaluationLink:
        """Channels for one evaluation, which may have another shape than training."""
        return EvaluationLink(
            self._sender(Kind.EVALUATION, self.stage + 1, announce=True) if self.stage < self._last else None,
            self._receiver(Kind.EVALUATION, self.stage - 1, ahead=0) if self.stage else None,
        )

    def _sender(self, kind: Kind, stage: int, *, announce: bool) -> Sender:
        name = f"{kind.value} from stage {self.stage} to stage {stage}"
        group, peer = self._groups[group_of(kind, min(self.stage, stage))], self.grid.stage_to_global(stage)
        if self._control is not None:
            wire = Wire(group, self._control, peer, _TAGS[kind], self._device)
            return AnnouncedSendChannel(wire, self._memory, name)
        return SendChannel(group, peer, self._memory, name, announce=announce)

    def _receiver(self, kind: Kind, stage: int, spec: TensorSpec | None = None, ahead: int | None = None) -> Receiver:
        name = f"{kind.value} from stage {stage} to stage {self.stage}"
        group, peer = self._groups[group_of(kind, min(self.stage, stage))], self.grid.stage_to_global(stage)
        ahead = min(_AHEAD, self.depth) if ahead is None else ahead
        if self._control is not None:
            wire = Wire(group, self._control, peer, _TAGS[kind], self._device)
            return AnnouncedReceiveChannel(wire, self._memory, name, ahead=ahead)
        return ReceiveChannel(group, peer, self._memory, name, ahead=ahead, spec=spec)


class EvaluationLink:
    """Activations of one evaluation, without running ahead."""

    def __init__(self, down: Sender | None, above: Receiver | None) -> None:
        self._down, self._above = down, above

    def send(self, spec: TensorSpec, hidden: Tensor, header: Header) -> None:
        """Send h_k and wait until the next stage has it."""
        assert self._down is not None
        self._down.send(spec, hidden, header)
        self._down.wait_in_flight(0)

    def receive(self) -> tuple[Tensor, Header]:
        """h_{k-1} and its header."""
        assert self._above is not None
        return self._above.take()

    def close(self) -> None:
        """End the background threads."""
        if self._down is not None:
            self._down.close()
        if isinstance(self._above, AnnouncedReceiveChannel):
            self._above.close()
