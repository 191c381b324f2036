"""Cases of the other workers, under NCCL's rules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

from ibp_deepspeed.comm.message import Memory
from ibp_deepspeed.stage.micro_batch import MicroBatchInFlight
from tests.transport.nccl_like import NcclLike


def run_case(case: dict[str, Any]) -> Any:
    """``worker``: whose case it is; ``transport``: options of the transport."""
    transport = NcclLike(**case.get("transport", {}))
    with transport.installed(), _allocating(transport):
        return import_module(f"tests.workers.{case.get('worker', 'parity')}").run_case(case)


@contextmanager
def _allocating(transport: NcclLike) -> Iterator[None]:
    """Where memory is asked for: messages, and activations."""
    new, forward, update = Memory.new, MicroBatchInFlight.forward, MicroBatchInFlight.update

    def allocating(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            transport.allocate()
            return function(*args, **kwargs)

        return run

    with (
        mock.patch.object(Memory, "new", allocating(new)),
        mock.patch.object(MicroBatchInFlight, "forward", allocating(forward)),
        mock.patch.object(MicroBatchInFlight, "update", allocating(update)),
    ):
        yield
