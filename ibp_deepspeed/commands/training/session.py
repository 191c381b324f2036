"""A training from its command line to its last checkpoint, whatever it trains: check, meet, train, save."""

from __future__ import annotations

import argparse
import os
from typing import IO, TYPE_CHECKING, NamedTuple, cast

from ibp_deepspeed import cli
from ibp_deepspeed.commands.training.alike import alike
from ibp_deepspeed.commands.training.callbacks import Callbacks, make_callbacks
from ibp_deepspeed.commands.training.checkpoints import resume, save
from ibp_deepspeed.commands.training.hosts import RollCall
from ibp_deepspeed.commands.training.interruption import EXIT_CODE, Interruption
from ibp_deepspeed.commands.training.launcher import launchers, when_one_ends
from ibp_deepspeed.commands.training.loop import Run
from ibp_deepspeed.commands.training.monitors import resume_monitors
from ibp_deepspeed.commands.training.output import claim
from ibp_deepspeed.commands.training.sources import say_sources
from ibp_deepspeed.commands.training.start import (
    agreement,
    begin_record,
    describe,
    end_record,
    start,
    summarise,
    throughput,
)
from ibp_deepspeed.commands.training.trace import batches as batches_to_trace
from ibp_deepspeed.commands.training.trace import path as trace_path
from ibp_deepspeed.errors import HostsError, InterlockingError

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ibp_deepspeed import InterlockedPipelineEngine
    from ibp_deepspeed.commands.training.trace import Batches
    from ibp_deepspeed.commands.training.training_plan import MakePlan, ParseArguments, TrainingPlan


class Checked(NamedTuple):
    """What this process is going to train.

    Attributes:
        plan: of the run.
        traced: the batches to trace, if any.
        said: lines that it has printed about it.
        lock: rank 0's hold on ``--output``.
        call: keeps, on rank 0, the job's store, at which the processes meet.
        callbacks: of the user, which rank 0 calls.
    """

    plan: TrainingPlan
    traced: Batches | None
    said: list[str]
    lock: IO[str] | None
    call: RollCall
    callbacks: list[TrainerCallback]


def train(phase: cli.SameOnAllRanks, description: str | None, parse: ParseArguments, make_plan: MakePlan) -> int:
    """Check, start, train, save.

    Args:
        phase: of the script.
        description: its help.
        parse: reads the command line.
        make_plan: what it asks for, checked.

    Returns:
        the exit code.
    """
    launched_by = launchers()
    args = parse(description)
    cli.outlive_readers()
    if not args.verbose:
        cli.quiet()
    checked = check(args, make_plan)
    if checked is None:
        return 0
    plan, traced, said, lock = checked.plan, checked.traced, checked.said, checked.lock
    pipeline = start(plan, args)
    resume(pipeline, plan, args)
    if traced is not None:
        cast("InterlockedPipelineEngine", pipeline).trace_batches(*traced, trace_path(args))
    data = plan.open_data(pipeline, args)
    record = None
    if pipeline.global_rank == 0:
        record = begin_record(pipeline, plan, args, said + describe(pipeline, plan, args, data))
        resume_monitors(pipeline.monitor, pipeline.global_steps)
    phase.ends()
    interruption = Interruption(args.grace_seconds, speaks=pipeline.global_rank == 0)
    when_one_ends(launched_by, interruption.ask)
    callbacks = Callbacks(checked.callbacks if pipeline.global_rank == 0 else [], args, pipeline)
    together = agreement(pipeline, args), interruption
    run = Run(pipeline, args, throughput(pipeline, plan, args), *together, plan.evaluate, callbacks)
    evaluation = run.train(data, lambda: save(pipeline, plan, args, data.train))
    interruption.saved()
    summary = summarise(run.speed, plan, args)
    if pipeline.global_rank == 0:
        if evaluation is not None and not run.stopped:
            print(plan.table(evaluation))
        print(summary)
        print(f"report in {end_record(record, args.output, summary, run.stopped)}")
        print(f"checkpoint in {args.output / 'checkpoint'}")
        if run.stopped:
            print(f"interrupted after batch {run.stopped} of {args.steps}: the same command with --resume goes on")
        elif run.ended:
            print(f"ended after batch {run.ended} of {args.steps}, as a callback asked")
        elif traced is not None:
            print(f"trace of batches {traced.first} to {traced.last} in {trace_path(args)}: scripts/trace_report.py")
    pipeline.close()
    if lock is not None:
        lock.close()
    if run.stopped:
        run.agreement.leave()
        return EXIT_CODE
    return 0


def check(args: argparse.Namespace, make_plan: MakePlan) -> Checked | None:
    """Before the processes meet, on every host: what is trained, with ``--output`` claimed; None: nothing is left."""
    from ibp_deepspeed.models.errors import AllTrained

    call = RollCall()
    try:
        plan, callbacks = make_plan(args), make_callbacks(args)
        first = os.environ["RANK"] == "0"
        traced = batches_to_trace(args, plan.resume)
        said = say_sources(plan, args) if first else []
        lock = claim(args) if first else None
    except AllTrained as nothing_left:  # a job that is started again and again ends well
        call.cannot_train(nothing_left)
        if os.environ["RANK"] == "0":
            print(f"{nothing_left}.")
        return None
    except Exception as error:
        verdict = call.cannot_train(error)
        if verdict and isinstance(error, InterlockingError):
            raise HostsError(verdict) from None
        raise
    call.can_train(alike(plan, args), args.output)
    return Checked(plan, traced, said, lock, call, callbacks)
