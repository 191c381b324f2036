"""What is trained, in operations (or measured seconds) and bytes of one micro-batch, and what a stage of it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from ibp_deepspeed.planner.learned_heads import Sizes
from ibp_deepspeed.schedule.simulator import Costs


@dataclass(frozen=True)
class Work:
    """Of a layer or a head, in a micro-batch.

    Attributes:
        forward, input_gradient, weight_gradient: floating-point operations of F, B and W; or seconds, for a device that
            does one of them a second (:mod:`ibp_deepspeed.planner.profile`).
        parameters: of them all.
        trained: parameters that an optimizer has state for.
        kept: bytes that its backward pass needs of its forward pass.
        at_once: what B and W at once take beyond the sum of both; below 0 if that is less.
        matrices: of the trained parameters, those that Muon would train, which it has one moment of instead of two.
    """

    forward: float
    input_gradient: float
    weight_gradient: float
    parameters: int
    trained: int
    kept: float
    at_once: float = 0.0
    matrices: int = 0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(
            self.forward + other.forward,
            self.input_gradient + other.input_gradient,
            self.weight_gradient + other.weight_gradient,
            self.parameters + other.parameters,
            self.trained + other.trained,
            self.kept + other.kept,
            self.at_once + other.at_once,
            self.matrices + other.matrices,
        )

    def times(self, samples: int) -> Work:
        """Of a micro-batch of so many times as many samples."""
        names = ("forward", "input_gradient", "weight_gradient", "kept", "at_once")
        return replace(self, **{name: samples * getattr(self, name) for name in names})

    @property
    def total(self) -> float:
        """F, B and W."""
        return self.forward + self.input_gradient + self.weight_gradient


NOTHING = Work(0.0, 0.0, 0.0, 0, 0, 0.0)
_Load = Callable[[int, int, int], float]
_Size = Callable[[Work], float]


@dataclass(frozen=True)
class Workload:
    """A model and a micro-batch.

    Attributes:
        name: of the model.
        layers: embedding, decoder layers, and the last layer with the LM head.
        head: an auxiliary head; None: there is none.
        message: bytes of the hidden states that cross a boundary.
        tokens: of a micro-batch.
        weight_bytes: of a weight as it is computed with: 4, or 2 with fp32 copies.
        sizes: of the model; None: not known.
        optimizer: AdamW or Muon.
    """

    name: str
    layers: tuple[Work, ...]
    head: Work | None
    message: float
    tokens: int
    weight_bytes: int
    sizes: Sizes | None = None
    optimizer: str = "AdamW"

    def times(self, samples: int) -> Workload:
        """With micro-batches of so many times as many samples."""
        layers = tuple(layer.times(samples) for layer in self.layers)
        head = None if self.head is None else self.head.times(samples)
        return replace(self, layers=layers, head=head, message=samples * self.message, tokens=samples * self.tokens)

    def stage(self, bounds: Sequence[int], stage: int) -> Work:
        """The layers bounds[stage] … bounds[stage+1]-1."""
        return sum(self.layers[bounds[stage] : bounds[stage + 1]], NOTHING)

    def costs(
        self, bounds: Sequence[int], flops: float, *, borrow: int = 0, recompute: Sequence[bool] = ()
    ) -> list[Costs]:
        """Seconds of each piece of each stage's work, on devices of that many operations a second.

        Args:
            bounds: of the stages.
            flops: a second.
            borrow: layers of the next stage before an auxiliary head.
            recompute: whether each stage runs forward again before its backward pass (default: none does).
        """
        head = 0.0 if self.head is None else self.head.total / flops
        found = []
        for stage, (low, _) in enumerate(pairwise(bounds)):
            work = self.stage(bounds, stage)
            borrowed = sum(layer.input_gradient for layer in self.layers[low : low + borrow])
            again = work.forward if recompute and recompute[stage] else 0.0
            found.append(
                Costs(
                    forward=work.forward / flops,
                    input_gradient=(work.input_gradient + again) / flops,
                    weight_gradient=work.weight_gradient / flops,
                    head=head,
                    borrowed_gradient=borrowed / flops,
                    at_once=work.at_once / flops,
                )
            )
        return found


def balanced(
    layers: Sequence[Work],
    stages: int,
    head: Work | None,
    exits: Sequence[int],
    size: _Size = lambda work: work.total,
) -> list[int]:
    """Bounds whose largest stage is as small as can be, an auxiliary head on every exit but the last counted.

    Args:
        layers: embedding, decoder layers, LM head.
        stages: K, at most the number of decoder layers.
        head: of an exit.
        exits: the stages that have one.
        size: what is balanced (default: the time of F, B and W).

    Returns:
        K+1 numbers; the embedding is on the first stage, the LM head on the last, a decoder layer on every one.
    """
    count = len(layers) - 2
    of_head = [0.0 if head is None or k not in exits or k == stages - 1 else size(head) for k in range(stages)]
    sums = [0.0, *accumulate(size(layer) for layer in layers[1:-1])]

    def load(stage: int, low: int, high: int) -> float:
        ends = (size(layers[0]) if stage == 0 else 0.0) + (size(layers[-1]) if stage == stages - 1 else 0.0)
        return sums[high] - sums[low] + of_head[stage] + ends

    bounds = _smallest_maximum(count, stages, load)
    return [0, *(bound + 1 for bound in bounds[1:-1]), len(layers)]


def over_mean(layers: Sequence[Work], bounds: Sequence[int], head: Work | None, exits: Sequence[int]) -> float:
    """By how much the slowest stage's F, B and W are over the mean stage's, as a share; see :func:`balanced`."""
    last = len(bounds) - 2
    times = [
        sum(layer.total for layer in layers[low:high])
        + (0.0 if head is None or k not in exits or k == last else head.total)
        for k, (low, high) in enumerate(pairwise(bounds))
    ]
    return max(times) * len(times) / sum(times) - 1


def _smallest_maximum(count: int, stages: int, load: _Load) -> list[int]:
    """Bounds 0 … count of non-empty ranges with the smallest greatest load, by bisection of what a stage may have."""
    low, high = 0.0, max(load(k, 0, count) for k in range(stages))
    best: list[int] = []
    for _ in range(60):
        middle = (low + high) / 2
        found = _greedy(count, stages, load, middle)
        low, high, best = (low, middle, found) if found else (middle, high, best)
    return best or _greedy(count, stages, load, high * (1 + 1e-9))


def _greedy(count: int, stages: int, load: _Load, most: float) -> list[int]:
    """Each stage takes as many layers as ``most`` allows and the others can spare; empty if that does not reach."""
    bounds = [0]
    for stage in range(stages):
        end = bounds[-1] + 1
        if end > count or load(stage, bounds[-1], end) > most:
            return []
        others = stages - stage - 1
        while end < count - others and load(stage, bounds[-1], end + 1) <= most:
            end += 1
        bounds.append(end)
    return bounds if bounds[-1] == count else []
