"""Ours against asynchronous backpropagation, which waits for nothing either, at equal predicted time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality.price import asynchronous_price
from benchmarks.quality.rate_tables import tuned_rows
from benchmarks.quality.records import Record
from benchmarks.quality.second import STEPS
from benchmarks.quality.second_report import after, best_of, by_length, relative, row_price
from benchmarks.quality.seeds import Table, difference


@dataclass(frozen=True)
class Rivals:
    """A row of ours and asynchronous backpropagation on as many stages.

    Attributes:
        ours, late: their rows.
        stages: K; with M micro-batches gradients are ⌈(K − 1)/M⌉ batches late.
        micro_batches: M.
        priced: the row whose schedule ours would have on K stages; its gradients are the same.
        over: the row that was trained with fewer batches too and has the same gradients.
    """

    ours: str
    late: str
    stages: int
    micro_batches: int
    priced: str
    over: str


def rivals() -> Iterator[Rivals]:
    """What can be compared: modules of four layers, and of two, with AdamW; of four with Muon; of four that never
    drain."""
    one, two = "asynchronous, 1 batch late", "asynchronous, 2 batches late"
    four, pairs, single = "G = 4, K = 8", "G = 2, K = 4", "local, K = 4"
    for stages, micro_batches in ((4, 4), (4, 8), (8, 4), (8, 8)):
        late = one if stages - 1 <= micro_batches else two
        own = pairs if stages == 4 else four
        yield Rivals(own, f"{late}, Nesterov", stages, micro_batches, own, four)
        if stages == 4:
            yield Rivals(single, f"{late}, Nesterov", stages, micro_batches, single, single)
        yield Rivals(f"{four}, Muon", f"{late}, Muon", stages, micro_batches, own, f"{four}, Muon")
        if late == two:  # modules of four are one batch late where the pipeline as a whole is two
            for optimizer, over in (("Muon", f"{four}, Muon"), ("Nesterov", four)):
                never = f"G = 4, 1 batch late, K = 8, {optimizer}"
                yield Rivals(never, f"{two}, {optimizer}", stages, micro_batches, never, over)


def late_table(records: Sequence[Record], tried: Sequence[Record]) -> Table:
    """Ours against asynchronous backpropagation that trains for the same predicted time, with the same optimizer
    (AdamW against Nesterov's Adam).

    Asynchronous backpropagation does STEPS batches; what ours reaches in as much time, which is fewer, is read off its
    trainings of other lengths, as in :func:`equal_time_table`. The last column is of as many batches of both.
    """
    table = [["", "M", "against", "seeds", "batches of ours in its time", "ours to it", "at equal tokens"]]
    ends = by_length([*best_of(tried), *records])
    for pair in rivals():
        ours, late, over = ends[pair.ours][STEPS], ends[pair.late][STEPS], ends[pair.over]
        if not ours.keys() & late.keys() or 0 not in over[STEPS]:
            continue
        share = (
            asynchronous_price(pair.stages, pair.micro_batches).time / row_price(pair.priced, pair.micro_batches).time
        )
        reached = after(relative(over), share * STEPS)
        scaled = {seed: loss * reached for seed, loss in ours.items()} if reached else {}
        named = pair.ours if pair.priced in pair.ours else f"{pair.priced}, Muon"
        seeds, done = str(len(ours.keys() & late.keys())), f"{share * STEPS:.0f}"
        compared = [difference(scaled, late), difference(ours, late)]
        table.append([named, str(pair.micro_batches), pair.late, seeds, done, *compared])
    return table


def rival_tables(of: Mapping[str, Sequence[Record]]) -> Iterator[tuple[str, Table]]:
    """Title and rows, if the study has begun."""
    if of.get("large"):
        tried = [*of.get("rates", ()), *of.get("late_rates", ())]
        yield "second study, asynchronous", late_table(tuned_rows(of), tried)
