"""What plan.py's command line asks for: the machines, the model, its stages."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ibp_deepspeed.errors import PlanError

if TYPE_CHECKING:
    from ibp_deepspeed.planner.hardware import Cluster, Device
    from ibp_deepspeed.planner.plan import Job

_GIB = 2**30


def device(args: argparse.Namespace) -> Device:
    """What --device, --tflops and --memory say.

    Raises:
        PlanError: an unknown name without its peak, or a value that can't be.
    """
    from ibp_deepspeed.planner.hardware import Device
    from models.devices import MEMORY_GIB, PEAK_FLOPS

    if args.device not in PEAK_FLOPS and args.tflops is None:
        known = ", ".join(PEAK_FLOPS)
        raise PlanError(f"--device {args.device} is not known: give its --tflops, or one of {known}.")
    for name in ("reached", "gbps", "host_gbps"):
        if getattr(args, name) <= 0:
            raise PlanError(f"--{name.replace('_', '-')} is {getattr(args, name):g}: give more than 0.")
    peak = PEAK_FLOPS[args.device] if args.tflops is None else args.tflops * 1e12
    source = "its data sheet" if args.tflops is None else "--tflops"
    gib = args.memory if args.memory is not None else MEMORY_GIB.get(args.device)
    text = f"{args.reached:.0%} of {peak / 1e12:g} TFLOP/s ({source})"
    return Device(args.device, peak * args.reached, None if gib is None else gib * _GIB, text)


def cluster(args: argparse.Namespace) -> Cluster:
    """Devices and links."""
    from ibp_deepspeed.planner.hardware import Cluster, Link

    latency = args.latency_us * 1e-6
    inside, between = Link(args.gbps * 1e9 / 8, latency), Link(args.host_gbps * 1e9 / 8, latency)
    slow = dict(_straggler(text) for text in args.straggler)
    return Cluster(device(args), inside, between, args.stages_a_host, stragglers=slow, jitter=args.jitter)


def _straggler(text: str) -> tuple[int, float]:
    stage, _, factor = text.partition("=")
    try:
        return int(stage), float(factor)
    except ValueError:
        raise PlanError(f"--straggler {text}: write it as STAGE=FACTOR, like 2=1.5.") from None


def make_job(args: argparse.Namespace) -> Job:
    """The model cut into balanced stages.

    Raises:
        InterlockingError: one sentence about the first thing that is wrong.
    """
    from ibp_deepspeed.config.interlocking import InterlockingConfig
    from ibp_deepspeed.planner.plan import Job
    from ibp_deepspeed.planner.workload import balanced
    from models import CausalLM
    from models.config import load_config
    from models.workload import workload
    from scripts.training.arguments import parse_overrides, parse_partition

    if args.stages is None:
        raise PlanError("the number of stages is missing: give --stages, or --search with --devices-total.")
    for name in ("stages", "micro_batches", "data_parallel", "micro_batch_size", "sequence_length"):
        if getattr(args, name) < 1:
            raise PlanError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give at least 1.")
    options = InterlockingConfig.parse({"aux_head": parse_overrides(args.head, "--head")}).aux_head
    assert options is not None
    if options.borrow:
        raise PlanError(f"--head borrow={options.borrow}: heads behind a borrowed layer have a row of their own.")
    machines = cluster(args)
    model = CausalLM(load_config(args.model, **parse_overrides(args.set)))
    if args.stages > model.num_layers - 2:
        raise PlanError(
            f"--stages is {args.stages}, the model has {model.num_layers - 2} decoder layers: give at most that many."
        )
    if options.negatives is not None and options.negatives > model.vocab_size:
        raise PlanError(
            f"--head negatives={options.negatives}: the vocabulary has {model.vocab_size} tokens, give at most those."
        )
    size = {"samples": args.micro_batch_size, "sequence_length": args.sequence_length}
    work = workload(model, options, **size, weight_bytes=4 if args.fp32 else 2)
    manual = parse_partition(args.partition)
    bounds = (
        balanced(work.layers, args.stages, work.head, range(args.stages))
        if manual is None
        else model.partition(args.stages, manual=manual)
    )
    return Job(work, bounds, args.micro_batches, args.data_parallel, machines, args.zero, args.recompute)
