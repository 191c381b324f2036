"""What the engine did in some batches, and when: stamped while it trains, gathered on rank 0 after the last one."""

from __future__ import annotations

import platform
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import PipeInstruction

from ibp_deepspeed.comm.clocks import offset_to_first
from ibp_deepspeed.comm.link_groups import new_host_group
from ibp_deepspeed.trace import chrome
from ibp_deepspeed.trace.spans import Process, Recording, Span

if TYPE_CHECKING:
    from ibp_deepspeed.engine.engine import InterlockedPipelineEngine


class Clock(Protocol):
    """Stamps that cost next to nothing, and become seconds of this process's ``time.perf_counter`` later."""

    def stamp(self) -> Any:
        """Now."""

    def seconds(self, stamps: list[Any]) -> list[float]:
        """Of stamps, once the work before the last one is done."""


class HostClock:
    """For stages that compute where they are called."""

    stamp = staticmethod(time.perf_counter)

    def seconds(self, stamps: list[float]) -> list[float]:
        """As they are."""
        return stamps


class DeviceClock:
    """For a GPU, which computes later than it is told to: events on the stream that the stage computes on.

    A stamp is when the device has come so far, so that a span is what the device did, and a receive's span is how
    long the device waited.

    Args:
        new_event: makes an event; ``torch.cuda.Event``'s interface.
    """

    def __init__(self, new_event: Any = None) -> None:
        self._new_event = new_event or (lambda: torch.cuda.Event(enable_timing=True))
        self._origin = self.stamp()
        self._origin.synchronize()
        self._host = time.perf_counter()

    def stamp(self) -> Any:
        """An event, recorded on the current stream."""
        event = self._new_event()
        event.record()
        return event

    def seconds(self, stamps: list[Any]) -> list[float]:
        """Of this process's clock; waits for the last one."""
        if stamps:
            stamps[-1].synchronize()
        return [self._host + 1e-3 * self._origin.elapsed_time(event) for event in stamps]


class Recorder:
    """Of one rank. Made on all ranks together.

    Args:
        first, last: batches, from 1.
        path: where rank 0 writes the trace.
        gpu: whether the stages compute on one.
    """

    def __init__(self, first: int, last: int, path: Path, *, gpu: bool) -> None:
        self.first, self.last, self.path, self._gpu = first, last, path, gpu
        self._group = new_host_group()
        self._clock: Clock = HostClock()
        self._stamps: list[Any] = []
        self._rows: list[tuple[str, int, int, int | None, int, int]] = []
        """Kind, batch, micro-batch, loss, places of start and end among the stamps."""
        self._batch = 0

    def covers(self, batch: int) -> bool:
        """Whether a batch, from 1, is recorded; called as it begins."""
        if batch == self.first and not self._rows and self._gpu:
            self._clock = DeviceClock()
        self._batch = batch
        return self.first <= batch <= self.last

    def instruction(self, command: PipeInstruction) -> AbstractContextManager[None]:
        """Around one of the schedule's instructions."""
        named = command.kwargs
        return self.span(type(command).__name__, named.get("micro_batch", -1), named.get("loss"))

    def span(self, kind: str, micro_batch: int, loss: int | None = None) -> AbstractContextManager[None]:
        """Around anything else that has a kind."""
        return _Stamped(self, kind, micro_batch, loss)

    def stamp(self) -> int:
        """The place of a new stamp."""
        self._stamps.append(self._clock.stamp())
        return len(self._stamps) - 1

    def keep(self, kind: str, micro_batch: int, loss: int | None, start: int, end: int) -> None:
        """A span between two stamps."""
        self._rows.append((kind, self._batch, micro_batch, loss, start, end))

    def finish(self, engine: InterlockedPipelineEngine) -> None:
        """After the last batch, on all ranks: gather the spans on one clock, and write them on rank 0.

        Raises:
            OutputError: the file can't be written.
        """
        times = self._clock.seconds(self._stamps)
        offset, uncertainty = offset_to_first(self._group)
        rank, grid = dist.get_rank(), engine.grid
        process = Process(rank, engine.stage_id, grid.get_data_parallel_rank(), platform.node(), uncertainty)
        spans = [
            Span(rank, kind, batch, micro_batch, loss, times[start] + offset, times[end] + offset)
            for kind, batch, micro_batch, loss, start, end in self._rows
        ]
        self._stamps, self._rows = [], []
        gathered: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object((process, spans), gathered, group=self._group, group_dst=0)
        if gathered is not None:
            chrome.write(self._recording(engine, gathered), self.path)

    def _recording(self, engine: InterlockedPipelineEngine, gathered: list[tuple[Process, list[Span]]]) -> Recording:
        origin = min(span.start for _, spans in gathered for span in spans)
        found = [replace(s, start=s.start - origin, end=s.end - origin) for _, spans in gathered for s in spans]
        return Recording(
            stages=engine.num_stages,
            micro_batches=engine.micro_batches,
            first=self.first,
            last=self.last,
            interlocking=engine.interlocking.model_dump(mode="json", exclude_unset=True),
            has_aux_heads=engine.module.has_aux_heads,
            frozen=engine.module.frozen_stages,
            device=torch.device(engine.device).type,
            processes=[process for process, _ in gathered],
            spans=sorted(found, key=lambda span: (span.rank, span.start, -span.end)),
        )


class _Stamped:
    """A span that is being recorded; a class, because it is entered for each instruction."""

    __slots__ = ("_kind", "_loss", "_micro_batch", "_recorder", "_start")

    def __init__(self, recorder: Recorder, kind: str, micro_batch: int, loss: int | None) -> None:
        self._recorder, self._kind, self._micro_batch, self._loss = recorder, kind, micro_batch, loss

    def __enter__(self) -> None:
        self._start = self._recorder.stamp()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = self._recorder.stamp()
        self._recorder.keep(self._kind, self._micro_batch, self._loss, self._start, end)
