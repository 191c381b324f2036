"""Whether to interlock, and how: what the planner's rows come to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ibp_deepspeed.errors import PlanError
from ibp_deepspeed.planner.plan import Job, Row, outlook
from ibp_deepspeed.planner.workload import balanced

INTERLOCK_BELOW = 0.95
"""Of the fastest exact schedule's time: what is not faster than that is not worth another loss."""
AS_FAST = 1.02
"""Of the fastest's time: predictions don't tell what is nearer than that apart."""


@dataclass(frozen=True)
class Advice:
    """What to do, and why.

    Attributes:
        row: the candidate that is advised; None: nothing fits.
        reason: in one or two sentences.
    """

    row: Row | None
    reason: str


def preferred(rows: Sequence[Row]) -> Row:
    """Of those that are as fast as the fastest, as far as predictions tell, the one that was measured to learn best.

    Args:
        rows: the fastest first; of those that learn alike it is taken.
    """
    as_fast = [row for row in rows if row.batch_time <= AS_FAST * rows[0].batch_time]
    return min(as_fast, key=lambda row: row.loss_above)


def what_would_fit(job: Job, rows: Sequence[Row], memory: float) -> str:
    """The smallest change of a job with which one of our rows fits, in a sentence; none is simulated.

    Args:
        job: of which nothing fits.
        rows: what was planned.
        memory: bytes of a device.
    """
    ours = [(row.candidate.name, row.candidate.block) for row in rows if row.candidate.block is not None]
    for change, changed in _changes(job):
        plain = {"strategy": "global", "exits": changed.stages, "backward": "fused"}
        for name, block in [("1F1B", plain), *ours]:
            try:
                most = max(stage.total for stage in outlook(changed, block).memory)
            except PlanError:  # another number of stages is not for every one of them
                continue
            if most <= memory:
                return f"{change} {name} would hold {most / 2**30:.1f} GiB, which fits."
    return "Not even one decoder layer a stage with recomputation would fit: take a smaller model or micro-batch."


def _changes(job: Job) -> Iterator[tuple[str, Job]]:
    """What a user may change, in words, and the job with it."""
    if not job.recompute:
        yield "With recomputation", replace(job, recompute=True)
    if not job.zero and job.replicas > 1:
        yield "With ZeRO 1", replace(job, zero=1)
    work, stages = job.workload, job.stages
    while stages < len(work.layers) - 2:
        stages = min(2 * stages, len(work.layers) - 2)
        longer = replace(job, bounds=balanced(work.layers, stages, work.head, range(stages)))
        yield f"On {stages} stages", longer
        yield f"On {stages} stages with recomputation", replace(longer, recompute=True)


def advise(job: Job, rows: Sequence[Row], tolerance: float = 0.02) -> Advice:
    """The :func:`preferred` candidate of ours that fits and whose loss was measured to be within ``tolerance`` of
    backpropagation's, if it is more than 5% faster than the best exact schedule that fits; else that one."""
    memory = job.cluster.device.memory
    running = [row for row in rows if row.timing is not None]
    fitting = [row for row in running if memory is None or row.most_memory <= memory]
    if not fitting:
        least = min(running, key=lambda row: row.most_memory, default=None)
        if least is None:
            raise PlanError(f"no way of training can run so; of {rows[0].candidate.name}: {rows[0].reason}")
        assert memory is not None
        return Advice(
            None,
            f"Nothing fits into {memory / 2**30:.3g} GiB: {least.candidate.name} holds least, "
            f"{least.most_memory / 2**30:.1f} GiB on its largest stage. {what_would_fit(job, rows, memory)}",
        )
    exact = min((row for row in fitting if row.exact), key=lambda row: row.batch_time, default=None)
    ours = [row for row in fitting if row.candidate.block is not None and not row.exact and row.learned is not None]
    good = [row for row in ours if row.learned is not None and row.learned.mean <= tolerance]
    best = preferred(sorted(good, key=lambda row: row.batch_time)) if good else None
    if exact is None or (best is not None and best.batch_time < INTERLOCK_BELOW * exact.batch_time):
        if best is None:
            chosen = min(fitting, key=lambda row: row.batch_time)
            return Advice(chosen, f"{chosen.candidate.name} is the fastest that fits; its learning is not measured.")
        against = (
            "" if exact is None else f" in {best.batch_time / exact.batch_time:.2f} of {exact.candidate.name}'s time"
        )
        return Advice(best, f"{best.candidate.name}{against}; {best.learned.sentence() if best.learned else ''}")
    missed = min(ours, key=lambda row: row.batch_time, default=None)
    why = (
        "nothing that interlocks is more than 5% faster"
        if best is not None or missed is None or missed.batch_time >= INTERLOCK_BELOW * exact.batch_time
        else f"what is faster ({missed.candidate.name}, {missed.batch_time / exact.batch_time:.2f} of the time) was "
        f"measured to learn worse than {tolerance:.0%} allows"
    )
    return Advice(exact, f"Do not interlock here: {why}. {exact.candidate.name} is exact and the fastest that fits.")
