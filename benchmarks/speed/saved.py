"""Bytes that autograd keeps between forward and backward, counted as they come and go."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class SavedActivations:
    """Counts what the forward passes of some modules save, by the name given to each module.

    A storage that is saved more than once counts once, parameters do not count.

    Args:
        parameters: of all modules.

    Attributes:
        bytes: by name, now.
        peak: by name, and of all together (``total``), so far.
        passes: by name, the numbers of the forward passes, for others to take.
        peak_passes: by name, the most forward passes of which something was kept at once.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self._storages: Counter[tuple[str, int]] = Counter()
        self._sizes: dict[tuple[str, int], int] = {}
        self._passes: dict[str, Counter[int]] = {}
        self._number = 0
        self.passes: dict[str, deque[int]] = defaultdict(deque)
        self.bytes: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.peak_passes: Counter[str] = Counter()

    def watched(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward function whose saved tensors are counted under ``name``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._number += 1
            number = self._number
            pack = torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: self._pack(name, number, tensor), lambda saved: saved.tensor
            )
            self.passes[name].append(number)
            with pack:
                return forward(*args, **kwargs)

        return run

    def holding(self, name: str, number: int, work: partial[None]) -> Callable[[], None]:
        """``work`` that is done later, whose tensors count until it is forgotten."""
        held = [_Saved(self, name, number, tensor) for tensor in work.args if isinstance(tensor, Tensor)]

        def run() -> None:
            work()
            held.clear()

        return run

    def _pack(self, name: str, number: int, tensor: Tensor) -> _Saved:
        return _Saved(self, name, number, tensor)

    def add(self, name: str, number: int, tensor: Tensor) -> None:
        """Something is kept."""
        place = tensor.untyped_storage().data_ptr()
        if place in self._parameters:
            return
        key, passes = (name, place), self._passes.setdefault(name, Counter())
        passes[number] += 1
        self._storages[key] += 1
        if self._storages[key] == 1:
            self._sizes[key] = tensor.untyped_storage().nbytes()
            self.bytes[name] += self._sizes[key]
        self.peak[name] = max(self.peak[name], self.bytes[name])
        self.peak["total"] = max(self.peak["total"], sum(self.bytes.values()))
        self.peak_passes[name] = max(self.peak_passes[name], len(+passes))

    def remove(self, name: str, number: int, tensor: Tensor) -> None:
        """It is kept no longer."""
        place = tensor.untyped_storage().data_ptr()
        if place in self._parameters:
            return
        key = (name, place)
        self._passes[name][number] -= 1
        self._storages[key] -= 1
        if not self._storages[key]:
            self.bytes[name] -= self._sizes.pop(key)


class _Saved:
    """A saved tensor, which says when it goes."""

    def __init__(self, counter: SavedActivations, name: str, number: int, tensor: Tensor) -> None:
        # an output of its own function would keep its graph, and so itself, alive
        self.tensor, self._counter, self._name, self._number = tensor.detach(), counter, name, number
        counter.add(name, number, self.tensor)

    def __del__(self) -> None:
        self._counter.remove(self._name, self._number, self.tensor)
