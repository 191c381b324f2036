"""Running means and variances of batch norms: moved once by a micro-batch, and the same on all replicas when used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class RunningStatistics:
    """Those of the norms in some layers (batch and instance norms of torch's classes).

    Args:
        layers: modules, or functions, which have none. Norms with weights in 16 bits keep their statistics in fp32,
            where the tenth of a small difference would be lost otherwise.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        modules = (m for layer in dict.fromkeys(layers) if isinstance(layer, nn.Module) for m in layer.modules())
        self._norms = [m for m in modules if isinstance(m, _NormBase) and m.track_running_stats]
        for norm in self._norms:
            _keep_in_fp32(norm)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around a forward pass that is run again: norms take the statistics of the micro-batch as before, and leave
        the running ones alone."""
        for norm in self._norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in self._norms:
                norm.track_running_stats = True

    def average(self, group: dist.ProcessGroup) -> None:
        """Take the mean over the replicas of a stage, each of which has seen its part of the data.

        Means of exponential averages are the averages of means, so training on and averaging again gives what
        averaging once at the end would.
        """
        buffers = [b for m in self._norms for b in (m.running_mean, m.running_var) if b is not None]
        replicas = dist.get_world_size(group)
        if replicas == 1 or not buffers:
            return
        flat = torch.cat([buffer.double().flatten() for buffer in buffers]) / replicas
        dist.all_reduce(flat, group=group)
        for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))


def _keep_in_fp32(norm: _NormBase) -> None:
    """Have a norm's statistics in fp32, also where its weights and inputs are not."""
    for name in ("running_mean", "running_var"):
        buffer = getattr(norm, name)
        if buffer is not None and buffer.is_floating_point() and torch.finfo(buffer.dtype).bits < 32:
            setattr(norm, name, buffer.float())
    if norm.weight is not None and norm.running_mean is not None and norm.weight.dtype != norm.running_mean.dtype:
        norm.forward = MethodType(_forward, norm)


def _forward(norm: _NormBase, inputs: Tensor) -> Tensor:
    """The norm's own, with its weights in the type of its statistics: torch takes inputs of another type than both."""
    own, wide = dict(norm._parameters), norm.running_mean.dtype  # type: ignore[union-attr]
    try:
        norm._parameters.update({name: p if p is None else p.to(wide) for name, p in own.items()})  # type: ignore[misc]
        return type(norm).forward(norm, inputs)
    finally:
        norm._parameters.update(own)
