"""Other systems' schedules executed without devices, batch after batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ibp_deepspeed.errors import ScheduleError
from ibp_deepspeed.planner.peers import Message, Peer, Step
from ibp_deepspeed.schedule.simulator import Boundary, Costs


@dataclass(frozen=True)
class Execution:
    """What a peer's batch takes, in the unit of the costs.

    Attributes:
        batch_time: a batch, when batches follow each other.
        idle: share of each rank's time.
        executed: steps of all ranks and batches.
    """

    batch_time: float
    idle: list[float]
    executed: int


def execute(
    peer: Peer,
    costs: Sequence[Costs],
    boundaries: Sequence[Boundary] | None = None,
    *,
    batches: int = 4,
    jitter: float = 0.0,
    seed: int = 0,
) -> Execution:
    """Execute a peer's schedule over some batches; a rank begins the next one when it has ended its own.

    Args:
        peer: the schedule.
        costs: of each chunk.
        boundaries: between neighbouring ranks, K-1; none costs anything if None.
        batches: the last one is measured, with jitter the second half of them.
        jitter, seed: as of the simulator, for each rank.

    Raises:
        ScheduleError: ranks that wait for each other for ever.
    """
    run = _Run(peer, costs, boundaries, batches, jitter, seed)
    while any([run.advance(rank) for rank in range(len(peer.programs))]):
        pass
    if any(len(row) <= batches for row in run.ends):
        raise ScheduleError(f"a peer's schedule waits for ever at steps {run.position}")
    first = batches // 2 if jitter else batches - 1
    spans = [(row[-1] - row[first]) / (batches - first) for row in run.ends]
    worked = [(row[-1] - row[first]) / (batches - first) for row in run.worked]
    return Execution(max(spans), [1 - busy / max(spans) for busy in worked], sum(run.position))


class _Run:
    """Where each rank is."""

    def __init__(
        self,
        peer: Peer,
        costs: Sequence[Costs],
        boundaries: Sequence[Boundary] | None,
        batches: int,
        jitter: float,
        seed: int,
    ) -> None:
        ranks = len(peer.programs)
        self._peer, self._costs, self._boundaries, self._batches = peer, costs, boundaries, batches
        self._jitter, self._random = jitter, [random.Random(f"{seed}/{rank}") for rank in range(ranks)]
        self._before = peer.prologues or [[] for _ in range(ranks)]
        self._clock, self._busy = [0.0] * ranks, [0.0] * ranks
        self._arrived: dict[Message, float] = {}
        self._free: dict[tuple[int, int], float] = {}
        self.position = [0] * ranks
        self.ends: list[list[float]] = [[0.0] for _ in range(ranks)]
        self.worked: list[list[float]] = [[0.0] for _ in range(ranks)]

    def advance(self, rank: int) -> bool:
        """Execute a rank's steps until it has to wait for another one; whether there was any."""
        before, program = self._before[rank], self._peer.programs[rank]
        start, count = self.position[rank], len(before) + self._batches * len(program)
        while self.position[rank] < count:
            at = self.position[rank] - len(before)
            batch, index = divmod(at, len(program)) if at >= 0 else (0, at)
            if not self._do(rank, program[index] if at >= 0 else before[at], batch * self._peer.micro_batches):
                break
            self.position[rank] += 1
            if index == len(program) - 1:
                self.ends[rank].append(self._clock[rank])
                self.worked[rank].append(self._busy[rank])
        return self.position[rank] > start

    def _do(self, rank: int, step: Step, first: int) -> bool:
        """One step of a batch whose first micro-batch has this number; False if a message is missing."""
        waits = [(kind, chunk, number + first) for kind, chunk, number in step.waits]
        if any(message not in self._arrived for message in waits):
            return False
        start = max([self._clock[rank], *(self._arrived.pop(message) for message in waits)])
        work = sum(self._drawn(rank, getattr(self._costs[chunk], piece)) for piece, chunk in step.pieces)
        self._clock[rank] = start + work
        self._busy[rank] += work
        for kind, chunk, number in step.sends:
            self._send(rank, (kind, chunk, number + first))
        return True

    def _send(self, rank: int, message: Message) -> None:
        kind, chunk, _ = message
        target, now, peer = chunk + (1 if kind == "F" else -1), self._clock[rank], self._peer
        if not 0 <= target < peer.chunks:
            return
        other = peer.places[target]
        if other == rank or self._boundaries is None:
            self._arrived[message] = now
            return
        links = self._boundaries
        link = links[min(rank, other)] if abs(rank - other) == 1 else max(links, key=lambda b: b.sending)
        self._free[rank, other] = max(now, self._free.get((rank, other), 0.0)) + link.sending
        self._arrived[message] = self._free[rank, other] + link.latency

    def _drawn(self, rank: int, cost: float) -> float:
        return cost * self._random[rank].lognormvariate(0.0, self._jitter) if cost and self._jitter else cost
