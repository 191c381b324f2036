"""What a training runs on, as far as a plan needs to know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ibp_deepspeed.errors import PlanError
from ibp_deepspeed.schedule.simulator import Boundary


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
    """

    device: Device
    inside: Link
    between: Link
    stages_a_host: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no cluster is.

        Raises:
            PlanError: a host without stages.
        """
        if self.stages_a_host is not None and self.stages_a_host < 1:
            raise PlanError(f"{self.stages_a_host} stages a host: give at least 1.")

    def link(self, boundary: int) -> Link:
        """Between stage ``boundary`` and the next one."""
        apart = self.stages_a_host is not None and (boundary + 1) % self.stages_a_host == 0
        return self.between if apart else self.inside

    def boundaries(self, stages: int, size: float) -> Sequence[Boundary]:
        """What messages of ``size`` bytes cost, K-1."""
        return [self.link(k).boundary(size) for k in range(stages - 1)]
