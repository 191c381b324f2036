"""Point-to-point messages with NCCL's rules, over gloo: what would wait for ever there waits here.

The rules, and where a reader can check them (torch 2.13, NCCL 2.x):

1. *One stream a communicator.* If the default group is bound to a device (``init_process_group(device_id=…)``, which
   DeepSpeed 0.19.8 passes on CUDA, ``deepspeed/comm/torch.py::TorchBackend.init_process_group``), groups are
   initialised eagerly, and all unbatched sends and receives of a group on one rank run on one communicator and one
   stream, in the order in which they were posted: ``ProcessGroupNCCL::pointToPoint`` ("unbatched P2P ops are treated as
   independent collective ops, and are thus serialized with all other ops on this ProcessGroup"). Without ``device_id``
   there is one communicator, and stream, for each pair of ranks (``lazy``).
2. *A send is a kernel that ends when the receive has taken its data*; a posted receive is a kernel that spins until
   then (NCCL's documentation, "Point-to-point communication": blocking for the GPU).
3. *The first operation between two ranks of a communicator blocks the host* until the other side posts its own
   (connections are made inside the group launch, NCCL's ``ncclTransportP2pSetup``).
4. *A work's* ``wait`` *makes the stream that computes wait*, nothing else.
5. *What synchronises the device* (cudaFree in the allocator's retry, a module's lazy loading) *waits for every kernel
   that was launched*, a spinning receive too (CUDA C programming guide, "Implicit synchronization").
6. *Kernels that run at once are bounded*; one that spins keeps its place.
7. *Beside an eager group, who is not in a new group splits NCCL's communicator with all others*: a gloo group of some
   ranks waits for ever (``torch.distributed.distributed_c10d._new_process_group_helper``, ``perform_nocolor_split``).
   Here that is an error.

A stream is a thread; a rank's computation is its main thread, so that its waiting for a work is rule 4.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from tests.transport.out_of_order import Delays

_DATA, _READY = 101, 102  # tags
_MEETING_SECONDS = 0.001

_isend, _irecv, _new_group, _get_backend = dist.isend, dist.irecv, dist.new_group, dist.get_backend


class Work:
    """What ``isend`` and ``irecv`` return."""

    def __init__(self) -> None:
        self._done = threading.Event()

    def wait(self, timeout: Any = None) -> bool:
        """Rule 4."""
        self._done.wait()
        return True

    def is_completed(self) -> bool:
        return self._done.is_set()

    def finish(self) -> None:
        self._done.set()


class _Stream:
    """Operations of one communicator on one rank, one after the other."""

    def __init__(self, kernels: threading.Semaphore, delays: Callable[[], float]) -> None:
        self._kernels, self._delays = kernels, delays
        self._posted: queue.SimpleQueue[tuple[Callable[[], None], Work] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def post(self, operation: Callable[[], None]) -> Work:
        work = Work()
        self._posted.put((operation, work))
        return work

    def end(self) -> None:
        """Behind what was posted: an idle thread would keep its group, and gloo's threads with it."""
        self._posted.put(None)

    def _run(self) -> None:
        while (posted := self._posted.get()) is not None:
            operation, work = posted
            time.sleep(self._delays())
            with self._kernels:
                operation()
            work.finish()


class NcclLike:
    """The transport of one process.

    Args:
        lazy: a communicator for each pair of ranks instead of one a group.
        kernels: how many can run at once.
        synchronise: how probable it is that an allocation synchronises the device.
        seed: of that draw.
        late: a seed: each stream starts its kernels late, by its own chance.
    """

    def __init__(
        self,
        *,
        lazy: bool = False,
        kernels: int = 8,
        synchronise: float = 0.0,
        seed: int = 0,
        late: int | None = None,
    ) -> None:
        self._lazy, self._synchronise, self._late = lazy, synchronise, late
        self._kernels = threading.Semaphore(kernels)
        self._streams: dict[Any, _Stream] = {}
        self._met: set[Any] = set()
        self._meetings: Any = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._posted: list[Work] = []
        self._lock = threading.Lock()
        self._random = random.Random(seed + dist.get_rank())
        self._gloo: set[Any] = set()
        self.aborted: list[Any] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """In the place of torch's, for all groups but those that were made for gloo by name."""
        with ExitStack() as stack:
            for name in ("isend", "irecv", "batch_isend_irecv", "new_group", "get_backend"):
                stack.enter_context(mock.patch.object(dist, name, getattr(self, f"_{name}")))
            stack.enter_context(mock.patch.object(dist.distributed_c10d, "_abort_process_group", self._abort))
            stack.callback(self._end)
            yield

    def _end(self) -> None:
        with self._lock:
            for stream in self._streams.values():
                stream.end()
            self._streams.clear()

    def _abort(self, group: Any = None) -> None:
        """What is posted is given up: threads of ours end with their process."""
        self.aborted.append(group)

    def acquainted(self, peer: int, groups: list[Any]) -> None:
        """Both ranks have met on these groups before."""
        self._met |= {(group, peer, role) for group in groups for role in ("send", "receive")}

    def synchronize(self) -> None:
        """Rule 5: wait for all kernels launched so far."""
        with self._lock:
            launched, self._posted = self._posted, [work for work in self._posted if not work.is_completed()]
        for work in launched:
            work.wait()

    def allocate(self) -> None:
        """An allocation, which now and then has to free memory first."""
        if self._random.random() < self._synchronise:
            self.synchronize()

    def _new_group(self, *args: Any, **kwargs: Any) -> Any:
        ranks = args[0] if args else kwargs.get("ranks")
        of_some = ranks is not None and len(ranks) < dist.get_world_size()
        if kwargs.get("backend") == "gloo" and of_some and not self._lazy:
            raise AssertionError(f"a gloo group of ranks {ranks}: the others would wait for ever (rule 7)")
        group = _new_group(*args, **kwargs)
        if kwargs.get("backend") == "gloo":
            self._gloo.add(group)
        return group

    def _get_backend(self, group: Any = None) -> str:
        return "gloo" if group in self._gloo else "nccl"

    def _batch_isend_irecv(self, operations: list[dist.P2POp]) -> list[Any]:
        """All as one kernel, which ends when each of them has met its other end."""
        peers = [_peer(op.peer, op.group, op.group_peer) for op in operations]
        parts = [self._part(op, peer) for op, peer in zip(operations, peers, strict=True)]

        def together() -> None:
            threads = [threading.Thread(target=part, daemon=True) for part in parts]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return [self._post(together, peers[0], operations[0].group, None)]

    def _part(self, operation: dist.P2POp, peer: int) -> Callable[[], None]:
        sends = getattr(operation.op, "__name__", "").endswith("isend")
        make = _sending if sends else _receiving
        return make(operation.tensor, peer, operation.group)

    def _isend(self, tensor: Tensor, dst: int | None = None, group: Any = None, tag: int = 0, **kwargs: Any) -> Any:
        if group in self._gloo:
            return _isend(tensor, dst, group, tag, **kwargs)
        peer = _peer(dst, group, kwargs.get("group_dst"))
        return self._post(_sending(tensor, peer, group), peer, group, "send")

    def _irecv(self, tensor: Tensor, src: int | None = None, group: Any = None, tag: int = 0, **kwargs: Any) -> Any:
        if group in self._gloo:
            return _irecv(tensor, src, group, tag, **kwargs)
        peer = _peer(src, group, kwargs.get("group_src"))
        return self._post(_receiving(tensor, peer, group), peer, group, "receive")

    def _post(self, operation: Callable[[], None], peer: int, group: Any, role: str | None) -> Work:
        if role is not None:  # a batch meets its peers as it runs
            self._meet(peer, group, role)
        key = (group, peer) if self._lazy else group
        with self._lock:
            if key not in self._streams:
                self._streams[key] = _Stream(self._kernels, self._delays_of(len(self._streams)))
            work = self._streams[key].post(operation)
            self._posted.append(work)
        return work

    def _delays_of(self, stream: int) -> Callable[[], float]:
        return (lambda: 0.0) if self._late is None else Delays(f"{self._late} {dist.get_rank()} {stream}")

    def _meet(self, peer: int, group: Any, role: str) -> None:
        """Rule 3."""
        other = "receive" if role == "send" else "send"
        if (group, peer, role) in self._met:
            return
        name, me = group.group_name, dist.get_rank()
        self._meetings.set(f"nccl-like/{name}/{me}/{peer}/{role}", "here")
        while not self._meetings.check([f"nccl-like/{name}/{peer}/{me}/{other}"]):
            time.sleep(_MEETING_SECONDS)  # waiting inside the store would hold up the other threads
        self._met.add((group, peer, role))


def _sending(tensor: Tensor, peer: int, group: Any) -> Callable[[], None]:
    def operation() -> None:
        _wait(_irecv(torch.empty(1), peer, group, _READY))
        _wait(_isend(tensor, peer, group, _DATA))

    return operation


def _receiving(tensor: Tensor, peer: int, group: Any) -> Callable[[], None]:
    def operation() -> None:
        _wait(_isend(torch.zeros(1), peer, group, _READY))
        _wait(_irecv(tensor, peer, group, _DATA))

    return operation


def _peer(rank: int | None, group: Any, group_rank: int | None) -> int:
    if rank is not None:
        return rank
    assert group_rank is not None
    return dist.get_global_rank(group, group_rank)


def _wait(work: Any) -> None:
    work.wait()
