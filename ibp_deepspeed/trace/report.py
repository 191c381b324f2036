"""Where the time of recorded batches went, stage by stage, and what a simulation makes of the same work."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.schedule.predict import Prediction, measure, settling_batches
from ibp_deepspeed.schedule.simulator import Boundary, Costs, Simulator
from ibp_deepspeed.schedule.validate import validated_timeline
from ibp_deepspeed.strategy.timeline import Timeline
from ibp_deepspeed.trace.chrome import instruction_of, messages
from ibp_deepspeed.trace.spans import CREDIT, WEIGHTS, Process, Recording, Span, own_seconds


@dataclass(frozen=True)
class Wait:
    """A stage that could not go on.

    Attributes:
        stage: which.
        cause: ``activations``, ``gradients``, ``credit`` or ``replicas``.
        peer: the stage that was waited for; None: the other replicas.
        seconds: how long, a batch.
        longest: the span of the longest one.
    """

    stage: int
    cause: str
    peer: int | None
    seconds: float
    longest: Span


@dataclass(frozen=True)
class StageTime:
    """Where the time of a stage went.

    Attributes:
        stage: which.
        seconds: from the start of the first batch to the end of the last one, a batch.
        computing: by the letter of the schedule's instructions (F, L, B, W, BW, Q), seconds a batch.
        waits: by cause, the longest first.
        other: by instruction: the optimizer's step, data, sending; seconds a batch.
        between: between batches: evaluations, checkpoints, reports; seconds a batch.
    """

    stage: int
    seconds: float
    computing: dict[str, float]
    waits: list[Wait]
    other: dict[str, float]
    between: float

    @property
    def bubble(self) -> float:
        """Share of the time in which it did not compute."""
        return 1 - sum(self.computing.values()) / self.seconds


@dataclass(frozen=True)
class Report:
    """Of one pipeline.

    Attributes:
        stages: by number.
        batch_time: of the slowest stage, seconds.
        predicted: by the schedule, from the pieces of work and messages as they were measured; in seconds.
        costs: these pieces, of each stage.
        boundaries: what messages take.
        overlap: of the time that messages were under way, the share in which their receivers computed; None: there
            are none.
        uncertainty: by which clocks may be off, seconds.
    """

    stages: list[StageTime]
    batch_time: float
    predicted: Prediction
    costs: list[Costs]
    boundaries: list[Boundary]
    overlap: float | None
    uncertainty: float


def analyse(recording: Recording, replica: int = 0) -> Report:
    """Times of one replica's stages, beside the prediction."""
    processes = recording.of_replica(replica)
    rows = [own_seconds(recording.by_rank[process.rank]) for process in processes]
    stages = [_stage_time(recording, place.stage, row) for place, row in zip(processes, rows, strict=True)]
    costs = [_costs(row) for row in rows]
    boundaries = _boundaries(recording, processes)
    return Report(
        stages=stages,
        batch_time=max(stage.seconds for stage in stages),
        predicted=_prediction(recording, costs, boundaries),
        costs=costs,
        boundaries=boundaries,
        overlap=_overlap(recording, processes),
        uncertainty=max(process.uncertainty for process in processes),
    )


def _stage_time(recording: Recording, stage: int, row: Sequence[tuple[Span, float]]) -> StageTime:
    """Sums of a stage's spans, a batch."""
    alone = all(process.replica == 0 for process in recording.processes)
    computing: dict[str, float] = defaultdict(float)
    other: dict[str, float] = defaultdict(float)
    waits: dict[tuple[str, int | None], list[tuple[float, Span]]] = defaultdict(list)
    for span, seconds in row:
        letter, cause = letter_of(span), _cause(span, stage, alone=alone)
        if cause is not None:
            waits[cause].append((seconds, span))
        elif letter:
            computing[letter] += seconds / recording.batches
        else:
            other[span.kind] += seconds / recording.batches
    total = (max(span.end for span, _ in row) - row[0][0].start) / recording.batches
    found = [
        Wait(
            stage,
            cause,
            peer,
            sum(seconds for seconds, _ in spans) / recording.batches,
            max(spans, key=lambda pair: pair[0])[1],
        )
        for (cause, peer), spans in waits.items()
    ]
    covered = sum(seconds for _, seconds in row) / recording.batches
    found.sort(key=lambda wait: -wait.seconds)
    return StageTime(stage, total, dict(computing), found, dict(other), total - covered)


def letter_of(span: Span) -> str:
    """Of a span that computes; W's own instruction only says where the last of it is due at the latest."""
    if span.kind == WEIGHTS:
        return "W"
    kind = instruction_of(span.kind)
    return kind.letter if kind is not None and kind.costs and span.kind != "BackwardWeight" else ""


def _cause(span: Span, stage: int, *, alone: bool) -> tuple[str, int | None] | None:
    """What a span waits for and from which stage; None: it does not wait. ``alone``: there are no other replicas."""
    kind = instruction_of(span.kind)
    if span.kind == CREDIT:
        return "credit", stage + 1
    if span.kind == "ReduceGrads" and not alone:
        return "replicas", None
    if kind is None or kind.receives is None:
        return None
    return kind.receives.name.lower(), stage - kind.receives.value


def _costs(row: Sequence[tuple[Span, float]]) -> Costs:
    """What a stage's pieces took on average; B and W at once are halved where neither was seen alone."""
    seconds: dict[str, list[float]] = defaultdict(list)
    weights: dict[tuple[int, int], float] = defaultdict(float)
    for span, own in row:
        if span.kind == WEIGHTS:
            weights[span.batch, span.micro_batch] += own
        else:
            seconds[span.kind].append(own)

    def mean(*kinds: str) -> float | None:
        values = [value for kind in kinds for value in seconds[kind]]
        return statistics.fmean(values) if values else None

    alone, together = mean("BackwardInput", "UpdateInput", "BackwardThrough"), mean("BackwardPass")
    apart = statistics.fmean(weights.values()) if weights else None
    if together is not None:
        alone = together / 2 if alone is None else alone
        apart = max(0.0, together - alone) if apart is None else apart
    return Costs(
        forward=mean("ForwardPass") or 0.0,
        input_gradient=alone or 0.0,
        weight_gradient=apart or 0.0,
        head=mean("AuxLoss") or 0.0,
        borrowed_gradient=mean("BackwardBorrowed") or 0.0,
        at_once=0.0 if together is None else together - (alone or 0.0) - (apart or 0.0),
    )


def _of_pipeline(recording: Recording, processes: Sequence[Process]) -> Iterable[tuple[int, Span, Span]]:
    """Messages of one pipeline with the boundary that they cross."""
    stages = {process.rank: process.stage for process in processes}
    for sent, taken in messages(recording):
        if sent.rank in stages:
            yield min(stages[sent.rank], stages[taken.rank]), sent, taken


def _boundaries(recording: Recording, processes: Sequence[Process]) -> list[Boundary]:
    """Latency: the median from the end of sending to the end of receiving, of messages that were waited for."""
    found: dict[int, list[float]] = defaultdict(list)
    for boundary, sent, taken in _of_pipeline(recording, processes):
        if taken.start < sent.end < taken.end:
            found[boundary].append(taken.end - sent.end)
    return [Boundary(latency=statistics.median(found[k]) if found[k] else 0.0) for k in range(recording.stages - 1)]


def _overlap(recording: Recording, processes: Sequence[Process]) -> float | None:
    own = {process.rank: dict(own_seconds(recording.by_rank[process.rank])) for process in processes}
    under_way = waited = 0.0
    for _, sent, taken in _of_pipeline(recording, processes):
        transit = max(0.0, taken.end - sent.start)
        under_way += transit
        waited += min(transit, own[taken.rank][taken])
    return 1 - waited / under_way if under_way else None


def _prediction(recording: Recording, costs: Sequence[Costs], boundaries: Sequence[Boundary]) -> Prediction:
    """The recorded batches of the same timeline, simulated, in a pipeline that is in motion before them."""
    config = InterlockingConfig.parse(recording.interlocking)
    timeline = Timeline(config, recording.stages, recording.micro_batches, recording.has_aux_heads, recording.frozen)
    valid, depth = validated_timeline(timeline), timeline.channel_depth()
    numbers = range(recording.first - 1, recording.last)
    warm_up = settling_batches(timeline.at(numbers[0]), depth)
    simulator = Simulator(
        [valid[timeline.at(numbers[0])]] * warm_up + [valid[timeline.at(number)] for number in numbers],
        channel_depth=depth,
        costs=costs,
        boundaries=boundaries,
        streaming=config.streaming,
    )
    return measure(simulator, warm_up, recording.micro_batches)
