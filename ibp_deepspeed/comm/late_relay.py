"""How tensors that are used some batches later travel from a stage to those before it, while all of them train.

From rank to rank, on the host, in a gloo process group of their own (so that the order of NCCL's operations is not
touched), moved by one background thread a rank. What they are and what they are used for is not known here.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ibp_deepspeed.comm.link_groups import LONG, PATIENCE
from ibp_deepspeed.errors import InterlockingError, PeerLostError, first_line

Copy = tuple[int, list[Tensor]]
_END = -1  # in the place of a batch: no copy follows
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)
_DIMENSIONS = 6


class LateRelay:
    """One stage's part of a way: copies come from the stage behind it on the way, and go on to the one before at once.

    Args:
        group: a gloo group that this pipeline is in, for such ways alone, one between any two ranks.
        ranks: stage → global rank, of the stages on the way, rising; the last of them sends, the others receive.
        stage: this one.
        like: tensors of the shapes and dtypes of a copy; None: each copy says them first.
        what: travels, in errors.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        ranks: Mapping[int, int],
        stage: int,
        like: Sequence[Tensor] | None,
        *,
        what: str,
    ) -> None:
        self.group, self.stage, self.what = group, stage, what
        stages = sorted(ranks)
        self._is_last = stage == stages[-1]
        self._below_listens = stage != stages[0]
        self._behind = stage if self._is_last else stages[stages.index(stage) + 1]
        self._from = ranks[self._behind]
        self._to = ranks[stages[stages.index(stage) - 1]]
        self._like = None if like is None else [tensor.to("meta") for tensor in like]
        self._given: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[Copy | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"{what} of stage {stage}", daemon=True)
        self._thread.start()

    def send(self, batch: int, copy: list[Tensor]) -> None:
        """On the stage that sends: start a copy, taken as ``batch`` began, on its way. Its tensors must not change."""
        self._given.put((batch, copy))

    def take(self, batch: int) -> list[Tensor]:
        """On the other stages: the next copy, which must be the one taken as ``batch`` began. Waits for it.

        Raises:
            PeerLostError: it can't come any more.
            InterlockingError: another copy came.
        """
        try:
            arrived = self._arrived.get(timeout=PATIENCE)
        except queue.Empty:
            arrived = TimeoutError(f"nothing came in {PATIENCE / 60:.0f} minutes")
        if isinstance(arrived, Exception):
            raise PeerLostError(
                f"lost the connection for {self.what} from stage {self._behind} to stage {self.stage}: "
                f"{first_line(arrived)}"
            ) from arrived
        taken, copy = arrived
        if taken != batch:
            raise InterlockingError(
                f"stage {self.stage} waits for the {self.what} of batch {batch} and was given those of batch {taken}: "
                "the stages don't train the same batches."
            )
        return copy

    def close(self, *, wait: bool) -> None:
        """The stage that sends says that no copy follows; ``wait`` until that has passed through this stage.

        A process that ends with its thread inside a receive would be aborted.
        """
        if self._is_last:
            self._given.put((_END, []))
        if wait:
            self._thread.join(PATIENCE)

    def _run(self) -> None:
        try:
            batch = 0
            while batch != _END:
                batch, copy = self._given.get() if self._is_last else self._receive()
                if batch != _END and not self._is_last:
                    self._arrived.put((batch, copy))
                self._pass_on(batch, copy)
            self._arrived.put(EOFError(f"the stage that sends {self.what} has ended"))
        except Exception as error:
            self._arrived.put(error)

    def _receive(self) -> Copy:
        batch = torch.empty(1, dtype=torch.int64)
        self._receive_into(batch)
        copy = [] if batch.item() == _END else self._empty()
        for tensor in copy:
            self._receive_into(tensor)
        return int(batch), copy

    def _empty(self) -> list[Tensor]:
        """Of the next copy's shapes."""
        if self._like is not None:
            return [torch.empty_like(tensor, device="cpu") for tensor in self._like]
        count = torch.empty(1, dtype=torch.int64)
        self._receive_into(count)
        said = torch.empty(int(count), 2 + _DIMENSIONS, dtype=torch.int64)
        self._receive_into(said)
        return [torch.empty(row[2 : 2 + row[1]], dtype=_DTYPES[row[0]]) for row in said.tolist()]

    def _receive_into(self, tensor: Tensor) -> None:
        work = dist.irecv(tensor, self._from, group=self.group)
        assert work is not None
        work.wait(LONG)

    def _pass_on(self, batch: int, copy: list[Tensor]) -> None:
        if not self._below_listens:
            return
        try:
            said = [] if self._like is not None or batch == _END else _shapes(copy)
            for tensor in [torch.tensor([batch]), *said, *copy]:
                dist.send(tensor, self._to, group=self.group)
        except RuntimeError:
            self._below_listens = False  # it has ended: if too early, the channels say so


def _shapes(copy: Sequence[Tensor]) -> list[Tensor]:
    """What is sent before the tensors of a copy: their number, and of each its dtype and shape."""
    rows = [[_DTYPES.index(t.dtype), t.dim(), *t.shape, *[0] * (_DIMENSIONS - t.dim())] for t in copy]
    return [torch.tensor([len(copy)]), torch.tensor(rows, dtype=torch.int64)]
