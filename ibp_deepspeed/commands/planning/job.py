"""What plan.py's command line asks for: the machines, the model, its stages."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from ibp_deepspeed.commands.planning.measured import check_subject, given_profile, measured
from ibp_deepspeed.commands.planning.subject import check_sizes, subject
from ibp_deepspeed.errors import PlanError

if TYPE_CHECKING:
    from ibp_deepspeed.planner.hardware import Cluster, Device
    from ibp_deepspeed.planner.plan import Job
    from ibp_deepspeed.planner.profile import Profile

_GIB = 2**30


def device(args: argparse.Namespace) -> Device:
    """What --device, --tflops and --memory say.

    Raises:
        PlanError: an unknown name without its peak, or a value that can't be.
    """
    from ibp_deepspeed.models.devices import MEMORY_GIB, PEAK_FLOPS
    from ibp_deepspeed.planner.hardware import Device

    name, reached = args.device or "H100", 0.45 if args.reached is None else args.reached
    if name not in PEAK_FLOPS and args.tflops is None:
        known = ", ".join(PEAK_FLOPS)
        raise PlanError(f"--device {name} is not known: give its --tflops, or one of {known}.")
    peak = PEAK_FLOPS[name] if args.tflops is None else args.tflops * 1e12
    source = "its data sheet" if args.tflops is None else "--tflops"
    gib = args.memory if args.memory is not None else MEMORY_GIB.get(name)
    text = f"{reached:.0%} of {peak / 1e12:g} TFLOP/s ({source})"
    return Device(name, peak * reached, None if gib is None else gib * _GIB, text)


def cluster(args: argparse.Namespace, profile: Profile | None) -> Cluster:
    """Devices and links; those of a profile where there is one."""
    from ibp_deepspeed.planner.hardware import Cluster, Link

    for name in ("reached", "gbps", "host_gbps"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise PlanError(f"--{name.replace('_', '-')} is {value:g}: give more than 0.")
    latency = (10.0 if args.latency_us is None else args.latency_us) * 1e-6
    inside = Link((400.0 if args.gbps is None else args.gbps) * 1e9 / 8, latency)
    between = Link(args.host_gbps * 1e9 / 8, latency)
    where, inside = (device(args), inside) if profile is None else measured(profile, args, inside)
    slow = dict(_straggler(text) for text in args.straggler)
    return Cluster(where, inside, between, args.stages_a_host, stragglers=slow, jitter=args.jitter)


def _straggler(text: str) -> tuple[int, float]:
    stage, _, factor = text.partition("=")
    try:
        return int(stage), float(factor)
    except ValueError:
        raise PlanError(f"--straggler {text}: write it as STAGE=FACTOR, like 2=1.5.") from None


def check_optimizer(args: argparse.Namespace) -> None:
    """That it can train so.

    Raises:
        PlanError: Muon can't in fp32 with ZeRO 1, see ``ibp_deepspeed.optimizer.configured``.
    """
    if args.optimizer == "Muon" and args.fp32 and args.zero:
        raise PlanError("--optimizer Muon needs whole matrices, --fp32 with --zero 1 cuts them: leave one out.")


def make_job(args: argparse.Namespace) -> Job:
    """The model cut into balanced stages.

    Raises:
        InterlockingError: one sentence about the first thing that is wrong.
    """
    from ibp_deepspeed.commands.training.arguments import parse_partition
    from ibp_deepspeed.models.workload import with_muon, workload
    from ibp_deepspeed.planner.learned_heads import Sizes
    from ibp_deepspeed.planner.plan import Job
    from ibp_deepspeed.planner.workload import balanced

    if args.stages is None:
        raise PlanError("the number of stages is missing: give --stages, or --search with --devices-total.")
    check_sizes(args, "stages", "micro_batches", "data_parallel", "micro_batch_size", "sequence_length")
    check_optimizer(args)
    profile = given_profile(args)
    machines = cluster(args, profile)
    model, options = subject(args)
    if args.stages > model.num_layers - 2:
        raise PlanError(
            f"--stages is {args.stages}, the model has {model.num_layers - 2} decoder layers: give at most that many."
        )
    if profile is None:
        size = {"samples": args.micro_batch_size, "sequence_length": args.sequence_length}
        work = workload(model, options, **size, weight_bytes=4 if args.fp32 else 2)
    else:
        check_subject(profile, args, model, options)
        work = replace(profile.workload(), sizes=Sizes(model.vocab_size, model.hidden_size))
    if args.optimizer == "Muon":
        work = with_muon(work, model, options)
    manual = parse_partition(args.partition)
    bounds = (
        balanced(work.layers, args.stages, work.head, range(args.stages))
        if manual is None
        else model.partition(args.stages, manual=manual)
    )
    return Job(work, bounds, args.micro_batches, args.data_parallel, machines, args.zero, args.recompute)
