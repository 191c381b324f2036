"""One layer, or one head with its loss, on a device: a micro-batch goes through it as through a stage of the engine."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ibp_deepspeed.compilation import compile_layers
from ibp_deepspeed.models.workload import kept_bytes
from ibp_deepspeed.stage.micro_batch import MicroBatchInFlight
from ibp_deepspeed.stage.weight_gradients import WeightGradients, split_backward

Run = Callable[[nn.Module, Any], Tensor]
"""(module, inputs) → what goes on to the next layer, or a loss."""


class Times(NamedTuple):
    """Seconds of one micro-batch there and back."""

    forward: float
    input_gradient: float
    weight_gradient: float
    backward: float


class Specimen:
    """A layer twice, with the same parameters: as autograd goes back through it, and with its backward pass split.

    Parameters wait on the CPU while another specimen is measured. Gradients are summed as the engine sums them: into
    ``.grad`` in fp32, in bf16 into fp32 sums after each backward pass, as DeepSpeed's BF16_Optimizer does.

    Args:
        name: for the reader.
        layers: the layers that it stands for.
        module: on the CPU, of the dtype that is computed with.
        run: what a forward pass is.
        inputs: makes a micro-batch's on a device: tokens, or hidden states, a leaf.
        compiled: compile the layer; then nothing is split.
    """

    def __init__(
        self,
        name: str,
        layers: list[int],
        module: nn.Module,
        run: Run,
        inputs: Callable[[torch.device], Tensor],
        *,
        compiled: bool = False,
    ) -> None:
        self.name, self.layers, self.compiled = name, layers, compiled
        self.parameters = list(module.parameters())
        self._whole, self._split = module, module
        self._later = WeightGradients()
        if not compiled:
            self._split = copy.deepcopy(module, {id(p): p for p in self.parameters})  # the same parameters
            split_backward([self._split], self._later)
        self._run, self._make_inputs = run, inputs
        self._inputs: Tensor | None = None
        self._gradient: Tensor | None = None
        self._sums: list[Tensor | None] = []
        self._is_compiled = False

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """On a device, ready to be measured; afterwards on the CPU again, without gradients."""
        self._move(device)
        if self.compiled and not self._is_compiled:
            compile_layers([], [self._whole], device)  # what of it the engine compiles, too
            self._is_compiled = True
        self._inputs = self._make_inputs(device)
        wide = [p.requires_grad and p.dtype == torch.bfloat16 for p in self.parameters]
        self._sums = [
            torch.zeros_like(p, dtype=torch.float32) if one else None
            for p, one in zip(self.parameters, wide, strict=True)
        ]
        try:
            yield
        finally:
            self._inputs, self._gradient, self._sums = None, None, []
            for parameter in self.parameters:
                parameter.grad = None
            self._move(torch.device("cpu"))

    def micro_batch(self) -> tuple[Times, Times]:
        """Twice there and back: with the backward pass in one piece, and with B first, then W."""
        return self.whole(), self.split()

    def whole(self) -> Times:
        """Forward, and B and W at once; of compiled layers also what an input gradient alone takes."""
        live, forward = self._forward(self._whole)
        alone = 0.0
        if self.compiled and live.inputs.requires_grad:
            alone = self._timed(lambda: live.backward_input(0))
        backward = self._timed(lambda: self._update(live))
        return Times(forward, alone, 0.0, backward)

    def split(self) -> Times:
        """Forward, B, W, as the engine splits them; of compiled layers nothing is split."""
        if self.compiled:
            return self.whole()
        live, forward = self._forward(self._split)

        def input_gradient() -> None:
            with self._later.put_off(live.weight_gradients):
                self._update(live)

        before = self._timed(input_gradient)
        after = self._timed(lambda: self._update_weights(live))
        return Times(forward, before, after, before + after)

    def kept(self) -> int:
        """Bytes that the backward pass needs of the forward pass."""
        return kept_bytes(lambda: self._run(self._split, self._inputs), self.parameters)

    def gradients(self) -> list[Tensor | None]:
        """The sums so far, of each parameter."""
        return [p.grad if s is None else s for p, s in zip(self.parameters, self._sums, strict=True)]

    def _forward(self, module: nn.Module) -> tuple[MicroBatchInFlight, float]:
        assert self._inputs is not None
        self._inputs.grad = None
        live = MicroBatchInFlight(lambda inputs: self._run(module, inputs))
        live.inputs = self._inputs
        seconds = self._timed(lambda: live.forward(input_gradient_follows=True))
        if self._gradient is None:
            self._gradient = torch.ones_like(live.outputs) if live.outputs.dim() == 0 else _like(live.outputs)
        live.output_gradients[0] = self._gradient
        return live, seconds

    def _update(self, live: MicroBatchInFlight) -> None:
        """The stage behind the loss or before the next one: on tokens no gradient ends."""
        trained = [p for p in self.parameters if p.requires_grad]
        live.update({0: 1.0}, None if live.inputs.requires_grad else trained)
        live.free()
        self._add_up()

    def _update_weights(self, live: MicroBatchInFlight) -> None:
        live.update_weights()
        self._add_up()

    @torch.no_grad()
    def _add_up(self) -> None:
        for parameter, total in zip(self.parameters, self._sums, strict=True):
            if total is not None and parameter.grad is not None:
                total.add_(parameter.grad)
                parameter.grad = None

    def _timed(self, work: Callable[[], Any]) -> float:
        assert self._inputs is not None
        device = self._inputs.device
        # of one thread on a CPU its own time counts, whatever else runs there (autograd goes back in the same thread)
        clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        _synchronise(device)
        began = clock()
        work()
        _synchronise(device)
        return clock() - began

    def _move(self, device: torch.device) -> None:
        for module in {self._whole, self._split}:
            module.to(device)


def _like(outputs: Tensor) -> Tensor:
    """A small gradient, as those that arrive are."""
    return torch.randn_like(outputs) / outputs.numel()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
