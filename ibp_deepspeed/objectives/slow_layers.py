"""Slow copies of a stage's first layers in the head before it, and the rule by which they follow.

What is copied is an exponential average of these layers, which has a step for each copy. A copy is taken as batch r·R
begins on the stage that is followed (r = 1, 2, …), and used from batch r·R + delay on. The rule knows batches only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ibp_deepspeed.config.interlocking import InterlockingConfig, least_refresh_delay
from ibp_deepspeed.config.objectives import MomentumOptions
from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.objectives.shared_readout import ReadoutSource, RefreshRule, fill_pending

START = 0
"""In the place of a copy's batch: the layers as they are, before any copy."""


class SlowLayers(nn.Module):
    """f̄(h) + B h: hidden states [..., H] → hidden states [..., H].

    Args:
        layers: f̄, which no gradient trains.
        width: H.
        dtype, device: of B.

    Attributes:
        layers: f̄.
        correction: B, no bias; it has to be 0 at first.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers).requires_grad_(False)
        self.correction = nn.Linear(width, width, bias=False, dtype=dtype, device=device)
        nn.init.zeros_(self.correction.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        outputs: Tensor = self.layers(hidden)
        return outputs + self.correction(hidden)


def slow_rule(interlocking: InterlockingConfig, micro_batches: int) -> RefreshRule | None:
    """When copies are taken and used; None if the configuration asks for none.

    A copy goes to the stage before, so that the least delay is that of a pipeline of two stages.
    """
    head = interlocking.aux_head
    if head is None or not isinstance(head.objective, MomentumOptions):
        return None
    options = head.objective
    delay = least_refresh_delay(2, micro_batches) if options.delay is None else options.delay
    return RefreshRule(options.interval, delay, options.average)


def head_copies(head: nn.Module) -> list[Tensor]:
    """The parameters of a head's :class:`SlowLayers`, in order.

    Raises:
        InterlockingError: it has none, or they are trained.
    """
    slow = [module.layers for module in head.modules() if isinstance(module, SlowLayers)]
    tensors: list[Tensor] = [parameter for layers in slow for parameter in layers.parameters()]
    if not tensors:
        raise InterlockingError(f"objective momentum needs heads with SlowLayers, a {type(head).__name__} has none.")
    if any(tensor.requires_grad for tensor in tensors):
        raise InterlockingError(
            f"the copied layers of a {type(head).__name__} are trained too: set requires_grad to False."
        )
    return tensors


def first_layers(stage: int, layers: Sequence[Any], count: int) -> list[Tensor]:
    """The parameters of the first ``count`` layers of a stage, in order.

    Raises:
        InterlockingError: it has fewer, or one that is no module.
    """
    if len(layers) < count:
        raise InterlockingError(
            f"objective momentum copies the first {count} layers of stage {stage}, which has {len(layers)}: use fewer "
            f'stages, or "layers": {max(1, len(layers))}.'
        )
    for layer in layers[:count]:
        if not isinstance(layer, nn.Module):
            raise InterlockingError(
                f"objective momentum copies the first {count} layers of stage {stage}, of which one is a "
                f"{type(layer).__name__}: make it an nn.Module."
            )
    return [parameter for layer in layers[:count] for parameter in layer.parameters()]


class Followed:
    """The layers that a head follows: their average, and the copies of it that are taken and not yet used.

    Args:
        now: these layers before the first batch, where copies are made.
        beta: β.

    Attributes:
        taken: by the batch at whose beginning it was taken.
    """

    def __init__(self, now: Sequence[Tensor], beta: float | None) -> None:
        self._beta = beta
        self.begin_again(now)

    def begin_again(self, now: Sequence[Tensor], pending: Sequence[int] = ()) -> None:
        """From these layers, with the copies of batches that are ``pending`` as they are now."""
        self._source = ReadoutSource(now, self._beta)
        self.taken = {batch: [tensor.detach().clone() for tensor in now] for batch in pending}

    def take(self, batch: int, now: Sequence[Tensor]) -> list[Tensor]:
        """A step of the average, and a copy of it."""
        self.taken[batch] = self._source.take(now)
        return self.taken[batch]

    def state(self, pending: Sequence[int]) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"taken": {batch: self.taken[batch] for batch in pending}, "average": self._source.average}

    def load(self, state: dict[str, Any]) -> None:
        """What :func:`completed` gives."""
        self._source.average, self.taken = state["average"], state["taken"]


def completed(
    state: dict[str, Any] | None, pending: Sequence[int], like: Sequence[Tensor], *, strict: bool, path: Any
) -> dict[str, Any] | None:
    """A checkpoint's state of the layers that a head follows, with the pending copies alone; None if it does not fit.

    Args:
        state: from :meth:`Followed.state`; None: there is none.
        pending: batches of the copies that a run which resumes needs.
        like: tensors of the shapes and dtypes of a copy.
        strict: refuse a state that lacks something; otherwise the newest copy before it takes its place, or the
            average.
        path: for errors.

    Raises:
        InterlockingError: it lacks something, or does not fit.
    """
    average, taken = ([], {}) if state is None else (state["average"], dict(state["taken"]))
    fits = [tensor.shape for tensor in average] == [tensor.shape for tensor in like]
    lacking = [batch for batch in pending if batch not in taken]
    if strict and (lacking or not fits):
        held = "does not exist" if state is None else f"holds those of batches {sorted(taken)}"
        when = f"as they were when batch {lacking[0]} began" if lacking else "in other shapes"
        raise InterlockingError(
            f"the next batches need a head's copies of layers {when}, but {path} {held}: resume with the layers, "
            "interval and delay that the checkpoint was trained with."
        )
    if not fits:
        return None
    fill_pending(taken, pending, [mean.to(t.dtype) for mean, t in zip(average, like, strict=True)])
    return {"taken": {batch: taken[batch] for batch in pending}, "average": average}


def begun_again(boundary: int) -> str:
    """For the user: a head's copies are not those of the checkpoint."""
    return f"head before layer {boundary}: its copies of the layers behind it begin as these are now"
