"""Whatever happens to one process of a job, all of them end, and one sentence says where and who was waited for."""

from __future__ import annotations

import re
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ibp_deepspeed.comm.announced_channel import AnnouncedReceiveChannel, Wire
from ibp_deepspeed.comm.message import META_LENGTH, Memory, TensorSpec
from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.engine.moment import Moment
from ibp_deepspeed.errors import BoundaryError
from ibp_deepspeed.schedule.generator import InterlockedTrainSchedule
from ibp_deepspeed.schedule.instructions import AuxLoss, OptimizerStep
from ibp_deepspeed.schedule.validate import validated_timeline
from ibp_deepspeed.strategy.timeline import Timeline
from tests.faults import at
from tests.launch import Run, launch

SILENT = [
    (2, 0, "kill", "OptimizerStep"),
    (3, 1, "kill", "ForwardPass"),
    (2, 1, "close", "SendGrad"),
]
"""Stages, the rank of the fault, what it is, before which instruction; all others with --full."""
_PLACE = r"error: rank \d: stage \d, [A-Z]\w+( of micro-batch \d)?( \(loss \d\))?, batch [23](, waiting for stage \d)?"


def inject(stages: int, rank: int, fault: str, instruction: str = "") -> Run:
    """Without a launcher: each rank has to end by itself."""
    case = {"stages": stages, "rank": rank, "fault": fault, "instruction": instruction}
    run = launch("faults", stages, case, timeout=60)
    assert None not in run.codes, (run.codes, run.output)
    return run


def errors(run: Run) -> list[str]:
    return [line for output in run.output for line in output.splitlines() if line.startswith("error:")]


def instructions(stages: int) -> list[tuple[int, str]]:
    """Each stage with each instruction that it has."""
    timeline = Timeline(InterlockingConfig.parse({"strategy": "pairwise"}), stages, 3, aux_heads=True)
    (schedules,) = validated_timeline(timeline, InterlockedTrainSchedule.for_batch).values()
    return sorted({(stage, type(command).__name__) for stage in range(stages) for command in schedules[stage].program})


def test_a_process_that_is_gone_or_cut_off_ends_all(full: bool) -> None:
    """SIGKILL, an exit with code 0 in the middle of a batch, sockets that are shut: the others say where they were."""
    rows = [*SILENT]
    if full:
        every = product(instructions(3), ("kill", "leave", "close"))
        rows += [(3, rank, fault, instruction) for (rank, instruction), fault in every]
    for stages, rank, fault, instruction in rows:
        run, about = inject(stages, rank, fault, instruction), (stages, rank, fault, instruction)
        wanted = {"kill": -9, "leave": 0, "close": 1}[fault]
        assert run.codes == [wanted if other == rank else 1 for other in range(stages)], (about, run.output)
        said = errors(run)
        assert len(said) == 1 and re.match(_PLACE, said[0]) and "lost the connection for" in said[0], (about, said)
        assert fault == "close" or f"stage {rank}" in said[0].partition("lost the connection")[2], (about, said)
        assert all("Traceback" not in output for output in run.output), run.output


@pytest.mark.parametrize(
    ("rank", "fault", "words"),
    [
        (0, "head", "in stage 0, AuxLoss of micro-batch 1 (loss 0), batch 2"),
        (1, "loss", "in stage 1, ForwardPass of micro-batch 1, batch 2"),
        (0, "loader", "in stage 0, LoadMicroBatch of micro-batch 1, batch 2"),
    ],
)
def test_an_exception_says_where_it_was_raised(rank: int, fault: str, words: str) -> None:
    run = inject(2, rank, fault)
    assert run.codes == [1, 1] and f"ValueError: broken on purpose\n{words}\n" in run.output[rank], run.output
    assert errors(run) == [f"error: rank {rank} failed:"], "the other one has nothing to say that is as good"
    assert f"ends: rank {1 - rank}: stage {1 - rank}, Recv" in run.output[1 - rank], run.output


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("header", "rank 1: stage 1 is at batch 2, micro-batch 0, its neighbour sent batch 8, micro-batch 0"),
        ("shape", "rank 1: activations from stage 0 to stage 1: the shape of a message is announced as [77, 77,"),
    ],
)
def test_a_message_that_is_none_is_named(fault: str, words: str) -> None:
    run = inject(2, 0, fault)
    said = errors(run)
    assert run.codes == [1, 1] and len(said) == 1 and words in said[0], run.output
    assert "Traceback" not in "".join(run.output)


def test_an_announcement_that_is_none_is_named() -> None:
    """Of the channels for NCCL, whose background thread reads it."""

    def receive(words: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        words.fill_(77)

    group: Any = None
    wire = Wire(group, group, 0, 0, torch.device("cpu"))
    with mock.patch.object(dist, "recv", receive):
        channel = AnnouncedReceiveChannel(wire, Memory(torch.device("cpu")), "activations", ahead=1)
        with pytest.raises(BoundaryError, match=r"^activations: the shape of a message is announced as \[77"):
            channel.take()


def test_shapes_of_messages_are_read_as_they_were_written() -> None:
    spec = TensorSpec((2, 0, 5), torch.bfloat16)
    assert TensorSpec.decode(spec.encode()) == spec
    for words in ([4, 1], [-1, 1], [0, META_LENGTH - 1], [0, -1], [0, 1, -3]):
        with pytest.raises(BoundaryError, match="which no stage says: do all processes run the same version"):
            TensorSpec.decode(torch.tensor(words + [0] * (META_LENGTH - len(words))))


def test_a_hook_acts_once_at_its_moment() -> None:
    acted: list[int] = []
    hook = at(lambda: acted.append(1), batch=2, instruction="AuxLoss", loss=1)
    for batch in (1, 2, 2):
        hook(Moment.of(OptimizerStep(), batch, rank=0, stage=0, replica=0))
        for loss in (0, 1):
            hook(Moment.of(AuxLoss(0, micro_batch=3, loss=loss), batch, rank=0, stage=0, replica=0))
    assert acted == [1]
