"""The table that plan.py prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ibp_deepspeed.planner.advice import Advice
    from ibp_deepspeed.planner.plan import Job, Row

_GIB = 2**30


def show(job: Job, rows: list[Row], advice: Advice) -> None:
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
    if any(row.learned is not None and row.learned.head is None and has_own_heads(row) for row in rows):
        console.print("Such heads were not measured: losses are those of private ones", soft_wrap=True)
    console.print(f"\nAdvice: {advice.reason}", soft_wrap=True)


def has_own_heads(row: Row) -> bool:
    """Whether its heads could learn otherwise than private linear ones."""
    from ibp_deepspeed.config.interlocking import InterlockingConfig
    from ibp_deepspeed.planner.learned_heads import head_options

    block = row.candidate.block
    return block is not None and bool(head_options(InterlockingConfig.parse(block).aux_head))


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
