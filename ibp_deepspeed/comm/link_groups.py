"""Which messages share a process group: the layout that the checker proves and the engine makes.

Over NCCL a group that is initialised eagerly (DeepSpeed binds a device) has one communicator and one stream on each
rank, on which its sends and receives run in the order in which they were posted, each until its peer has taken part
(``torch.distributed.ProcessGroupNCCL::pointToPoint``). A rank that sent and received on one group would make the one
wait for the other. So each kind of message has two groups, for the boundaries of even and of odd number: on each of
them a rank has one role and one peer.

Groups of two ranks for each boundary and kind would do as well, with as many communicators on a rank (six at most, four
of them in training). But making a group is collective over the world, so they would take 3 · (K − 1) calls for each
replica at the start instead of six. Groups without a bound device have a communicator for each pair of ranks, but that
is DeepSpeed's to decide. What a communicator costs in memory are the buffers of its connections, and NCCL connects two
ranks when they first need it: one peer a communicator, whatever K. Megatron-LM (``p2p_communication``), torch's
pipelining and DeepSpeed's DualPipeV batch the operations of a step: a stage then waits for both neighbours at each of
them, which is what interlocking avoids.
"""

from __future__ import annotations

from datetime import timedelta
from enum import Enum
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

LONG = timedelta(days=365)
"""A thread may wait for the next message as long as the training takes."""
# A receive stays posted while all stages evaluate or write a checkpoint; torch would give NCCL 10 minutes.
_TIMEOUT = max(torch.distributed.constants.default_pg_timeout, deepspeed.constants.default_pg_timeout)

PATIENCE = dist.constants.default_pg_timeout.total_seconds()
"""Seconds that an ending process gives its neighbours' last words: it must not end inside a receive."""


class Kind(Enum):
    """What a message over a boundary is."""

    ACTIVATIONS = "activations"
    GRADIENTS = "gradients"
    EVALUATION = "evaluation activations"


GroupName = tuple[Kind, int]


def group_of(kind: Kind, boundary: int) -> GroupName:
    """The group of the messages between stages ``boundary`` and ``boundary`` + 1."""
    return kind, boundary % 2


def groups_of(stages: int) -> list[GroupName]:
    """All groups of a pipeline, in the order in which they are made."""
    return list(dict.fromkeys(group_of(kind, boundary) for kind in Kind for boundary in range(stages - 1)))


def make_groups(grid: Any) -> dict[GroupName, dist.ProcessGroup]:
    """The groups of this rank's pipeline; on all ranks together, as making a group is collective."""
    return {name: new_pipeline_group(grid) for name in groups_of(grid.pipe_parallel_size)}


def new_pipeline_group(grid: Any) -> dist.ProcessGroup:
    """A group of this rank's pipeline, whose group ranks are the stages; made for all pipelines on all ranks."""
    mine: dist.ProcessGroup | None = None
    for ranks in grid.topology().get_axis_comm_lists("pipe"):
        group = dist.new_group(ranks, timeout=_TIMEOUT)
        if grid.get_global_rank() in ranks:
            mine = group
    assert mine is not None
    return mine


def new_host_group() -> dist.ProcessGroup:
    """A gloo group of all ranks, for messages between hosts that training threads wait for as long as it takes.

    Of all, because beside an eager NCCL group torch has the ranks that are not in a new group split NCCL's
    communicator, which waits for those that are, and they make a gloo group and don't
    (``_new_process_group_helper``, ``perform_nocolor_split``).
    """
    return dist.new_group(backend="gloo", timeout=LONG)
