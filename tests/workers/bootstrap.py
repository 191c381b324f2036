"""How each process of a job begins and ends, whatever its worker: meet, run the cases, report.

A worker is a module of this folder with ``run_case(case)``, whose result goes to the test as JSON; or with
``main(phase, argument)``, which is run as the repository's scripts run theirs and may fail.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from ibp_deepspeed import cli, init_distributed

_SKEW_SECONDS = 5.0  # a rank waits so long for a lower one to speak: forks start at once, a user's processes may not
_PEER_SECONDS = 1.0  # and one that has lost its neighbour so long for a launcher, which there is none of


def run(worker: str, argument: Any, report: Path) -> None:
    """In one process: run ``tests.workers.<worker>`` and write what each case gives to ``report``."""
    module = import_module(f"tests.workers.{worker}")
    if hasattr(module, "main"):
        cli._SKEW_SECONDS, cli._PEER_SECONDS = _SKEW_SECONDS, _PEER_SECONDS
        cli.run(partial(_meet_and_fail, module.main, argument))
    meet()
    gc.freeze()  # what is imported stays: looking for circles would look through all of it
    results = []
    for case in argument:
        results.append(module.run_case(case))
        destroy_groups()
    report.write_text(json.dumps(results))


def _meet_and_fail(main: Callable[..., None], argument: Any, phase: cli.SameOnAllRanks) -> None:
    meet()
    main(phase, argument)


def meet() -> None:
    """All processes of the job, with one thread each and without DeepSpeed's log."""
    init_distributed()
    deepspeed.utils.logger.setLevel("ERROR")
    torch.set_num_threads(1)


def destroy_groups() -> None:
    """Give back the threads and sockets of a case before the next one.

    An engine is in circles of references: groups that it still has would keep theirs until Python looks for circles.
    """
    dist.barrier()
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
