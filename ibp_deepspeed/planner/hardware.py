"""What a training runs on, as far as a plan needs to know it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ibp_deepspeed.errors import PlanError
from ibp_deepspeed.planner.timing import Unevenness
from ibp_deepspeed.schedule.simulator import Boundary, Costs


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: for the reader.
        flops: floating-point operations a second that a stage's layers reach (a peak times what is reached of it).
        memory: bytes; None: not checked.
        source: where these numbers come from.
    """

    name: str
    flops: float
    memory: float | None
    source: str


@dataclass(frozen=True)
class Link:
    """Between two devices.

    Attributes:
        bandwidth: bytes a second, each way.
        latency: seconds.
    """

    bandwidth: float
    latency: float

    def boundary(self, size: float) -> Boundary:
        """Of messages of ``size`` bytes."""
        return Boundary(self.latency, size / self.bandwidth)


@dataclass(frozen=True)
class Cluster:
    """Devices, and how neighbouring stages are connected.

    Attributes:
        device: all alike.
        stages_a_host: consecutive stages of one pipeline on a host; None: all.
        inside, between: links inside a host, and between two.
        replicas_apart: whether replicas of a pipeline that is on one host are on others.
        stragglers: stage → by what its work takes longer.
        jitter: standard deviation of the logarithm of a factor on each piece of work, drawn by ``seed``.
    """

    device: Device
    inside: Link
    between: Link
    stages_a_host: int | None = None
    replicas_apart: bool = False
    stragglers: Mapping[int, float] = field(default_factory=dict)
    jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no cluster is.

        Raises:
            PlanError: a host without stages, negative jitter, a straggler that takes no time.
        """
        if self.stages_a_host is not None and self.stages_a_host < 1:
            raise PlanError(f"{self.stages_a_host} stages a host: give at least 1.")

        if self.jitter < 0:
            raise PlanError(f"a jitter of {self.jitter:g}: give 0 or more, 0.1 for about 10% up and down.")
        for stage, factor in self.stragglers.items():
            if factor <= 0:
                raise PlanError(f"stage {stage} takes {factor:g} times as long: give more than 0, 1.5 for half more.")

    def reduction(self, stages: int) -> tuple[Link, int]:
        """What the gradients of replicas are summed over, and how many stages of a host do so over it at once."""
        if self.stages_a_host is None and not self.replicas_apart:
            return self.inside, 1
        return self.between, min(stages, self.stages_a_host or stages)

    @property
    def uneven(self) -> Unevenness:
        """What has to be simulated as it is."""
        return Unevenness(self.jitter, self.seed, bool(self.stragglers))

    def slowed(self, costs: Sequence[Costs]) -> list[Costs]:
        """Costs of each stage, stragglers' times their factors.

        Raises:
            PlanError: a straggler that there is not.
        """
        missing = [stage for stage in self.stragglers if not 0 <= stage < len(costs)]
        if missing:
            raise PlanError(f"stage {missing[0]} can't be slow, the {len(costs)} stages are 0 to {len(costs) - 1}.")
        return [cost.scaled(self.stragglers.get(stage, 1.0)) for stage, cost in enumerate(costs)]

    def link(self, boundary: int) -> Link:
        """Between stage ``boundary`` and the next one."""
        apart = self.stages_a_host is not None and (boundary + 1) % self.stages_a_host == 0
        return self.between if apart else self.inside

    def boundaries(self, stages: int, size: float) -> Sequence[Boundary]:
        """What messages of ``size`` bytes cost, K-1."""
        return [self.link(k).boundary(size) for k in range(stages - 1)]
