"""Proof, without devices, that the order in which messages are posted under NCCL's rules has no cycle of waits.

A stage's host follows its instructions; its channels' threads, and the streams of its communicators, follow the host.
Each waits for named events only and never takes one away from another, so that all of them together either come to
their end in any order, or stop at the same place in any order: one run is a proof.

The rules (tests/transport/nccl_like.py names their sources): operations of a communicator run on a rank in the order
in which they were posted, each until its peer's runs too; the first one between two ranks blocks whoever posts it until
the peer posts its own; a host that synchronises its device waits for all that it has posted.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from ibp_deepspeed.comm.link_groups import Kind, group_of
from ibp_deepspeed.errors import ScheduleError
from ibp_deepspeed.schedule.instructions import Instruction, Link, Schedule

_KIND = {Link.ACTIVATIONS: Kind.ACTIVATIONS, Link.GRADIENTS: Kind.GRADIENTS}
Channel = tuple[Link, int]  # and the stage that sends
Wait = tuple[str, Callable[[], bool]]  # what for, and whether it is over


@dataclass(frozen=True)
class PostingRules:
    """How the ends of a channel post its messages.

    Attributes:
        communicator: (kind, boundary) → the communicator of its messages.
        announced: whether a message is posted at both ends only after the sender has announced it and the receiver has
            answered, by threads of theirs; otherwise the host posts sends at once and receives before it needs them.
        ahead: receives posted, or messages received, before they are asked for.
        synchronise: whether every host synchronises its device before each instruction: what ends then ends if they do
            at some of them.
    """

    communicator: Callable[[Kind, int], Hashable] = group_of
    announced: bool = True
    ahead: int = 2
    synchronise: bool = True


def check_posts(
    batches: Sequence[Sequence[Schedule]], channel_depth: int | None, rules: PostingRules | None = None
) -> None:
    """Run batches that follow each other, each of K schedules, to their end under NCCL's rules.

    Args:
        batches: the K schedules of each batch, by stage.
        channel_depth: micro-batches a stage may run ahead of the next one (None: unbounded).
        rules: those of the engine if not given.

    Raises:
        ScheduleError: they stop; who waits for what.
    """
    _Pipeline(batches, channel_depth, rules or PostingRules()).run()


@dataclass
class _Ends:
    """One channel: what has happened to its messages, counted, and who has posted."""

    queued: int = 0
    announced: int = 0
    answered: int = 0
    done: int = 0
    taken: int = 0
    met: dict[int, bool] = field(default_factory=lambda: defaultdict(bool))  # by rank: has posted once


class _Pipeline:
    def __init__(self, batches: Sequence[Sequence[Schedule]], depth: int | None, rules: PostingRules) -> None:
        self.rules, self.depth, self.stages = rules, depth, len(batches[0])
        self.ends: dict[Channel, _Ends] = defaultdict(_Ends)
        self.streams: dict[tuple[int, Hashable], deque[Channel]] = defaultdict(deque)
        self.posted, self.finished = [0] * self.stages, [0] * self.stages
        programs = [[i for batch in batches for step in batch[k].steps() for i in step] for k in range(self.stages)]
        self.processes = {f"stage {k}": self._host(k, program) for k, program in enumerate(programs)}
        if rules.announced:
            for link in Link:
                for k in range(self.stages):
                    if 0 <= k + link.value < self.stages:
                        self.processes[f"sender of {link.name.lower()} of stage {k}"] = self._sender((link, k))
                        self.processes[f"receiver of {link.name.lower()} of stage {k}"] = self._receiver((link, k))

    def run(self) -> None:
        """Advance everybody as far as possible; hosts have to come to their end, threads may wait for more."""
        waits: dict[str, Wait | None] = {name: next(process, None) for name, process in self.processes.items()}
        moving = True
        while moving:
            moving = self._advance_streams()
            for name, process in self.processes.items():
                while (wait := waits[name]) is not None and wait[1]():
                    waits[name], moving = next(process, None), True
        stuck = {name: wait[0] for name, wait in waits.items() if wait is not None}
        if any(name.startswith("stage ") for name in stuck):
            raise ScheduleError("; ".join(f"{name} waits for {what}" for name, what in stuck.items()))

    def _host(self, stage: int, program: Sequence[object]) -> Iterator[Wait]:
        begun = 0
        for instruction in program:
            if not isinstance(instruction, Instruction):
                continue
            if self.rules.synchronise:
                launched = self.posted[stage]
                yield f"its device before {instruction}", lambda n=launched: self.finished[stage] >= n  # type: ignore[misc]
            if instruction.begins:
                begun += 1
                yield f"credit for {instruction}", lambda n=begun: self._has_credit(stage, n)  # type: ignore[misc]
            if instruction.sends is not None:
                yield from self._send((instruction.sends, stage))
            if instruction.receives is not None:
                yield from self._take((instruction.receives, stage - instruction.receives.value), instruction)

    def _has_credit(self, stage: int, begun: int) -> bool:
        if self.depth is None or stage == self.stages - 1:
            return True
        return self.ends[Link.ACTIVATIONS, stage].done > begun - 1 - self.depth

    def _send(self, channel: Channel) -> Iterator[Wait]:
        self.ends[channel].queued += 1
        if not self.rules.announced:
            yield from self._post(channel, channel[1])

    def _take(self, channel: Channel, instruction: Instruction) -> Iterator[Wait]:
        ends, (link, sender) = self.ends[channel], channel
        wanted = ends.taken + 1
        if not self.rules.announced:
            while ends.answered < wanted + self.rules.ahead:  # receives that were posted
                ends.answered += 1
                yield from self._post(channel, sender + link.value)
        yield f"the message of {instruction}", lambda: ends.done >= wanted
        ends.taken = wanted

    def _sender(self, channel: Channel) -> Iterator[Wait]:
        ends, number = self.ends[channel], 0
        while True:
            number += 1
            yield "a message", lambda n=number: ends.queued >= n  # type: ignore[misc]
            ends.announced = number
            yield "an answer", lambda n=number: ends.answered >= n  # type: ignore[misc]
            yield from self._post(channel, channel[1])
            yield "its transfer", lambda n=number: ends.done >= n  # type: ignore[misc]

    def _receiver(self, channel: Channel) -> Iterator[Wait]:
        ends, number = self.ends[channel], 0
        while True:
            number += 1
            yield "a place", lambda n=number: n - ends.taken <= max(1, self.rules.ahead)  # type: ignore[misc]
            yield "an announcement", lambda n=number: ends.announced >= n  # type: ignore[misc]
            ends.answered = number
            yield from self._post(channel, channel[1] + channel[0].value)
            yield "its transfer", lambda n=number: ends.done >= n  # type: ignore[misc]

    def _post(self, channel: Channel, rank: int) -> Iterator[Wait]:
        """A rank's operation for the next message of a channel."""
        link, sender = channel
        peer = sender + link.value if rank == sender else sender
        self.streams[rank, self._communicator(channel)].append(channel)
        self.posted[rank] += 1
        met = self.ends[channel].met
        met[rank] = True
        yield f"stage {peer} to meet it", lambda: met[peer]

    def _communicator(self, channel: Channel) -> Hashable:
        link, sender = channel
        return self.rules.communicator(_KIND[link], min(sender, sender + link.value))

    def _advance_streams(self) -> bool:
        """End every operation whose two ends are first on their streams."""
        moved = False
        for (rank, communicator), stream in self.streams.items():
            if stream and stream[0][1] == rank:  # the sender's end
                channel = stream[0]
                other = self.streams.get((rank + channel[0].value, communicator))
                if other and other[0] == channel:
                    stream.popleft()
                    other.popleft()
                    self.ends[channel].done += 1
                    self.finished[rank] += 1
                    self.finished[rank + channel[0].value] += 1
                    moved = True
        return moved
