"""What each way to train a model on a pipeline costs, before it starts: time, memory, messages, extra work.

    python scripts/plan.py --model models/configs/llama-tiny.json --stages 4 --device H100
    python scripts/plan.py --model meta-llama/Meta-Llama-3-8B --stages 8 --stages-a-host 4 --micro-batches 16 \\
        --device H100 --host-gbps 100 --zero 1 --data-parallel 4 --head negatives=16384

Times are simulated from the schedules that are executed (DeepSpeed's and torch's own lists for the others), with the
operations of each stage's layers and heads, and messages of the hidden states. Nothing is run on a device; --profile
takes times that profile_stage.py has measured on one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ibp_deepspeed import cli
from ibp_deepspeed.errors import OutputError, PlanError
from scripts.subject import add_subject_arguments, check_sizes, subject

if TYPE_CHECKING:
    from ibp_deepspeed.planner.hardware import Cluster, Device
    from ibp_deepspeed.planner.plan import Advice, Job, Row
    from ibp_deepspeed.planner.profile import Profile

_GIB = 2**30


class _ListDevices(argparse.Action):
    """As --help, the known GPUs."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from models.devices import MEMORY_GIB, PEAK_FLOPS

        for name, peak in PEAK_FLOPS.items():
            print(f"{name}: {peak / 1e12:g} TFLOP/s in dense bf16, {MEMORY_GIB[name]:g} GB")
        parser.exit()


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject_arguments(parser)
    add = parser.add_argument_group("the pipeline").add_argument
    add("--stages", type=int, required=True, metavar="K")
    add("--micro-batches", type=int, default=8, metavar="M", help="of a batch (default: %(default)s)")
    add("--data-parallel", type=int, default=1, metavar="R", help="pipelines side by side (default: %(default)s)")
    add("--zero", type=int, default=0, choices=[0, 1], help="ZeRO stage (default: %(default)s)")
    add("--recompute", action="store_true", help="stages run forward again before their backward pass")
    add("--partition", metavar="N,N,…", help="decoder layers of each stage, or profile:FILE (default: balanced)")
    add = parser.add_argument_group("the machines").add_argument
    add("--profile", type=Path, metavar="FILE", help="times, and memory, as profile_stage.py measured them on a device")
    add("--device", metavar="NAME", help="a known GPU, see --devices, or any name with --tflops (default: H100)")
    add("--devices", action=_ListDevices, nargs=0, help="list the known GPUs, and stop")
    add("--tflops", type=float, metavar="X", help="peak of the device, 10^12 operations a second")
    add("--memory", type=float, metavar="GIB", help="of the device (default: a known GPU's; otherwise not checked)")
    add("--reached", type=float, metavar="X", help="part of the peak that layers reach (default: 0.45)")
    add("--stages-a-host", type=int, metavar="N", help="consecutive stages on a host (default: all)")
    add("--gbps", type=float, help="10^9 bits a second inside a host, each way (default: the profile's, or 400)")
    add("--host-gbps", type=float, default=100.0, help="the same between hosts (default: %(default)s)")
    add("--latency-us", type=float, help="of a message, microseconds (default: the profile's inside a host, or 10)")
    add = parser.add_argument_group("the answer").add_argument
    add("--tolerance", type=float, default=2.0, metavar="%", help="loss above backpropagation's that is accepted")
    add("--json", type=Path, metavar="FILE", help="write all numbers here")
    add("--write", type=Path, metavar="FILE", help="write the DeepSpeed JSON of what is advised here")
    return parser.parse_args(words)


def device(args: argparse.Namespace) -> Device:
    """What --device, --tflops and --memory say.

    Raises:
        PlanError: an unknown name without its peak, or a value that can't be.
    """
    from ibp_deepspeed.planner.hardware import Device
    from models.devices import MEMORY_GIB, PEAK_FLOPS

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
    from scripts.measured import measured

    for name in ("reached", "gbps", "host_gbps"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise PlanError(f"--{name.replace('_', '-')} is {value:g}: give more than 0.")
    latency = (10.0 if args.latency_us is None else args.latency_us) * 1e-6
    inside = Link((400.0 if args.gbps is None else args.gbps) * 1e9 / 8, latency)
    between = Link(args.host_gbps * 1e9 / 8, latency)
    where, inside = (device(args), inside) if profile is None else measured(profile, args, inside)
    return Cluster(where, inside, between, args.stages_a_host)


def make_job(args: argparse.Namespace) -> Job:
    """The model cut into balanced stages.

    Raises:
        InterlockingError: one sentence about the first thing that is wrong.
    """
    from ibp_deepspeed.planner.plan import Job
    from ibp_deepspeed.planner.workload import balanced
    from models.workload import workload
    from scripts.measured import check_subject, given_profile
    from scripts.training.arguments import parse_partition

    check_sizes(args, "stages", "micro_batches", "data_parallel", "micro_batch_size", "sequence_length")
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
        work = profile.workload()
    manual = parse_partition(args.partition)
    bounds = (
        balanced(work.layers, args.stages, work.head, range(args.stages))
        if manual is None
        else model.partition(args.stages, manual=manual)
    )
    return Job(work, bounds, args.micro_batches, args.data_parallel, machines, args.zero, args.recompute)


def show(job: Job, rows: list[Row], advice: Advice, args: argparse.Namespace) -> None:
    """The table, the fastest first, what can't run, and the advice."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    work, where = job.workload, job.cluster.device
    by_work, by_parameters = unevenness(job)
    head = "no heads" if work.head is None else f"a head {head_share(job):.2f} forward passes of a middle stage"
    console.print(
        f"{work.name}: {job.stages} stages with decoder layers {decoder_layers(job)}, {job.replicas} × "
        f"{job.micro_batches} micro-batches of {work.tokens:,} tokens; {head}\n"
        f"with a head on each, the slowest stage is {by_work:.0%} over the mean (balanced by parameters: "
        f"{by_parameters:.0%})\n"
        f"{where.name}: {where.source}; messages of {work.message / 2**20:.1f} MiB",
        soft_wrap=True,
    )
    table = Table("", "ms a batch", "tokens/s", "idle, stages 0 and K-1", "GiB, largest stage", "of these head")
    for title in ("GiB a batch over a link", "work", "gradients", "loss against backpropagation"):
        table.add_column(title)
    running = sorted((row for row in rows if row.timing is not None), key=lambda row: row.batch_time)
    for row in running:
        table.add_row(*cells(job, row), style="bold" if row is advice.row else None)
    console.print(table)
    for row in rows:
        if row.reason is not None:
            console.print(f"{row.candidate.name}: {row.reason}", soft_wrap=True)
    if any(row.timing is not None and not row.timing.simulated for row in rows):
        console.print("~: continued from smaller pipelines, all stages as slow as the slowest", soft_wrap=True)
    console.print(f"\nAdvice: {advice.reason}", soft_wrap=True)


def cells(job: Job, row: Row) -> list[str]:
    """A row of the table."""
    timing = row.timing
    assert timing is not None
    tokens = job.replicas * job.micro_batches * job.workload.tokens / row.batch_time
    limit = job.cluster.device.memory
    full = " (too much)" if limit is not None and row.most_memory > limit else ""
    said = "same" if row.exact else "not measured"
    if row.learned is not None:
        said = f"{row.learned.mean:+.1%} ({row.learned.size})"
    return [
        row.candidate.name + ("" if timing.simulated else " ~"),
        f"{1e3 * row.batch_time:.4g}",
        f"{tokens:,.0f}",
        f"{timing.idle[0]:.0%} … {timing.idle[-1]:.0%}",
        f"{row.most_memory / _GIB:.1f}{full}",
        f"{max(m.head for m in row.memory) / _GIB:.1f}",
        f"{row.link_bytes / _GIB:.2f}",
        f"{row.work:.2f}",
        "exact" if row.exact else "late" if row.candidate.block is None else "interlocked",
        said,
    ]


def head_share(job: Job) -> float:
    """Forward and backward of a head, in forward passes of the middle stage."""
    middle = job.workload.stage(job.bounds, job.stages // 2)
    return 0.0 if job.workload.head is None else job.workload.head.total / middle.forward


def unevenness(job: Job) -> tuple[float, float]:
    """By how much the slowest stage is over the mean, a head on each: of the job's cut, and of one by parameters."""
    from ibp_deepspeed.planner.workload import balanced, over_mean

    layers, head, every = job.workload.layers, job.workload.head, range(job.stages)
    other = balanced(layers, job.stages, head, every, size=lambda work: work.parameters)
    return over_mean(layers, job.bounds, head, every), over_mean(layers, other, head, every)


def decoder_layers(job: Job) -> str:
    """How many each stage has."""
    last = job.stages - 1
    counts = [job.bounds[k + 1] - job.bounds[k] - (k == 0) - (k == last) for k in range(job.stages)]
    return ",".join(map(str, counts)) if len(counts) <= 16 else f"{min(counts)} to {max(counts)}"


def as_json(job: Job, rows: list[Row], advice: Advice) -> str:
    """All numbers, in seconds and bytes."""
    from dataclasses import asdict

    return json.dumps(
        {
            "stages": job.stages,
            "bounds": list(job.bounds),
            "advice": advice.reason,
            "rows": [asdict(row) for row in rows],
        },
        indent=1,
    )


def ds_config(job: Job, advice: Advice, args: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed JSON of what is advised, the rest as in the presets.

    Raises:
        PlanError: nothing of ours is advised.
    """
    from scripts.training.arguments import parse_overrides

    block = None if advice.row is None else advice.row.candidate.block
    if advice.row is not None and advice.row.candidate.name == "1F1B":
        block = {"strategy": "global", "exits": job.stages, "backward": "fused"}
    if block is None:
        raise PlanError(f"--write: there is no configuration of ours for this. {advice.reason}")
    preset = Path(__file__).resolve().parents[1] / "ds_configs" / f"local_{'cpu' if args.fp32 else 'gpu'}.json"
    settings: dict[str, Any] = json.loads(preset.read_text(encoding="utf-8"))
    settings |= {
        "train_micro_batch_size_per_gpu": args.micro_batch_size,
        "gradient_accumulation_steps": job.micro_batches,
        "zero_optimization": {**settings.get("zero_optimization", {}), "stage": job.zero},
        "interlocking": {**block, "aux_head": {**parse_overrides(args.head, "--head"), **block.get("aux_head", {})}},
    }
    return settings


def main(phase: cli.SameOnAllRanks) -> None:
    """Plan, and say it."""
    args = parse_arguments()
    cli.quiet()
    from tqdm import tqdm

    from ibp_deepspeed.planner.plan import advise, candidates, evaluate

    for path in (args.json, args.write):
        if path is not None and not path.parent.is_dir():
            raise OutputError(f"there is no folder {path.parent} to write {path.name} to: make it first.")
    job = make_job(args)
    rows = [evaluate(job, c) for c in tqdm(list(candidates(job.stages)), desc="plan", leave=False, disable=None)]
    advice = advise(job, rows, args.tolerance / 100)
    show(job, rows, advice, args)
    if args.json is not None:
        args.json.write_text(as_json(job, rows, advice) + "\n", encoding="utf-8")
    if args.write is not None:
        args.write.write_text(json.dumps(ds_config(job, advice, args), indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.write}")


if __name__ == "__main__":
    cli.run(main)
