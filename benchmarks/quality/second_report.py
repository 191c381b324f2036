"""Tables of the second study, and of the first one's headlines at three seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import log
from statistics import mean
from typing import Any

from benchmarks.quality.price import REAL, Price, asynchronous_price, head_price, price
from benchmarks.quality.rate_tables import at_best_rate, longer_rates_table, rates_table, tuned_rows
from benchmarks.quality.records import Record
from benchmarks.quality.second import (
    BACKPROPAGATION,
    HEADS,
    LAYERS,
    OVER_TOKENS,
    ROWS,
    STEPS,
    VOCABULARY,
    WIDTH,
    lowest_rate,
)
from benchmarks.quality.seeds import Table, by_seed, difference, last_exit
from benchmarks.quality.sizes import DEPTHS
from benchmarks.quality.sizes import WIDTH as THIN
from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.planner.learned_heads import Sizes, divided


def seeds_table(records: Sequence[Record]) -> Table:
    """Each row of the study ``seeds`` at its seeds, and its paired differences with backpropagation."""
    groups: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        groups[record["run"]["row"], record["run"]["stages"]].append(record)
    cosine = by_seed(groups["global", 4])
    decayed = by_seed(groups["global, constant, then decay", 4])
    seeds = sorted(cosine)
    table = [["", "K", *(f"seed {s}" for s in seeds), "mean", "to global, cosine", "to global, constant, then decay"]]
    for (row, stages), group in groups.items():
        found = by_seed(group)
        losses = [f"{found[seed]:.3f}" if seed in found else "–" for seed in seeds]
        where = "–" if row.startswith("global") else str(stages)
        compared = [difference(found, cosine), difference(found, decayed)]
        table.append([row, where, *losses, f"{mean(found.values()):.3f}", *compared])
    return table


def heads_table(records: Sequence[Record], full: Sequence[Record]) -> Table:
    """Cheaper heads below the same rows with whole ones, which are of the study ``full``; and what each costs at real
    sizes (:func:`head_price`)."""
    complete: dict[str, list[Record]] = defaultdict(list)
    for record in full:
        if record["run"]["steps"] == STEPS and not record["run"]["cosine"]:
            complete[record["run"]["row"]].append(record)
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["run"]["row"]].append(record)
    operations = [f"operations at {size}" for size in REAL.values()]
    table = [["", "seeds", "held-out loss of the exits", "last exit", "to whole heads", *operations]]
    for whole in dict.fromkeys(row.whole for row in HEADS.values() if row.whole):
        alike = [name for name in groups if ROWS[name].whole == whole]
        for name in (whole, *alike) if alike else ():
            group = complete[whole] if name == whole else groups[name]
            columns = zip(*(r["curve"][-1][1] for r in group), strict=True)
            exits = [mean(column) for column in columns if None not in column]
            compared = "–" if name == whole else difference(by_seed(group), by_seed(complete[whole]))
            cells = [" ".join(f"{loss:.2f}" for loss in exits), f"{exits[-1]:.3f}", compared]
            cells += [f"{head_price(ROWS[name].block['aux_head'], VOCABULARY, WIDTH, model):.1%}" for model in REAL]
            table.append([name, str(len(group)), *cells])
    return table


def learned_rows(of: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """For the planner: rows of three seeds, against backpropagation with the same learning-rate schedule.

    The better schedule is taken where a row has both, and the larger model.
    """
    groups: dict[tuple[str, int, bool], list[Record]] = defaultdict(list)
    for record in of.get("seeds", ()):
        run = record["run"]
        groups[run["row"].split(", constant")[0], run["stages"], run["cosine"]].append(record)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cosine in (True, False):
        baseline = by_seed(groups["global", 4, cosine])
        for (row, stages, kind), group in groups.items():
            if kind == cosine and row != "global":
                _learn(found, _kind(group[0], stages), by_seed(group), baseline, group[0])
    second: dict[str, list[Record]] = defaultdict(list)
    for record in tuned_rows(of):
        run = record["run"]
        tuned = ("NAdam" if run.get("delay") else "AdamW", "Muon")  # the rival as it is best, with its correction
        if run["steps"] == STEPS and not run["cosine"] and run.get("optimizer", "AdamW") in tuned:
            second[run["row"]].append(record)
    for row, group in second.items():
        if row != ROWS[row].exact and _is_plain(group[0]):
            baseline = by_seed(second[ROWS[row].exact])
            _learn(found, _kind(group[0], ROWS[row].pipeline), by_seed(group), baseline, group[0])
    return list(found.values())


def learned_heads(of: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """For the planner: kinds of heads on a number of exits, against whole ones at the same seeds and the same rate,
    which is the one of the study ``large``."""
    wholes: dict[str, dict[int, float]] = defaultdict(dict)
    for record in of.get("large", ()):
        if record["run"]["steps"] == STEPS and not record["run"]["cosine"]:
            wholes[record["run"]["row"]][record["run"]["seed"]] = last_exit(record)
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in of.get("heads", ()):
        groups[record["run"]["row"]].append(record)
    found = []
    for row, group in groups.items():
        head = ROWS[row].block["aux_head"]
        options = {key: value for key, value in head.items() if value != "private"}
        ends, full = by_seed(group), wholes[ROWS[row].whole or ""]
        ratios = [ends[seed] / full[seed] - 1 for seed in sorted(ends.keys() & full.keys())]
        if len(divided(options)[1]) > 1 or not ratios:
            continue
        exits = len(InterlockingConfig.parse(ROWS[row].block).exits_for(ROWS[row].stages))
        spread = {"mean": mean(ratios), "low": min(ratios), "high": max(ratios)}
        rounded = {name: round(number, 4) for name, number in spread.items()}
        compared = Sizes(VOCABULARY, WIDTH).compared(options)
        found.append({"options": options, "compared": compared, "exits": exits, **rounded, "seeds": len(ratios)})
    return found


def _kind(record: Record, stages: int) -> tuple[int, int, str, int]:
    """Width, exits, mode and borrowed layers, by which the planner asks."""
    config = InterlockingConfig.parse(record["run"]["interlocking"])
    if record["run"].get("delay"):
        return 0, 1, "late", 0
    borrow = 0 if config.aux_head is None else config.aux_head.borrow
    return config.width_for(stages), len(config.exits_for(stages)), config.mode, borrow


def _is_plain(record: Record) -> bool:
    """Nothing that the planner doesn't ask for: phases, mixtures, blocks in heads, gradients two batches late, or those
    of modules late."""
    run = record["run"]
    known = 1 if run["stages"] == 1 else 0
    block, head = run["interlocking"], run["interlocking"].get("aux_head") or {}
    return not (block.keys() & {"schedule", "mixed"} or head.get("blocks") or (run.get("delay") or 0) > known)


def _learn(
    found: dict[tuple[Any, ...], dict[str, Any]],
    kind: tuple[int, int, str, int],
    seeds: Mapping[int, float],
    baseline: Mapping[int, float],
    record: Record,
) -> None:
    """Put a row of three seeds in the place of what was known of its kind: larger models come later."""
    common, run = sorted(seeds.keys() & baseline.keys()), record["run"]
    if len(common) < 3:
        return
    ratios = [seeds[seed] / baseline[seed] - 1 for seed in common]
    width, exits, mode, borrow = kind
    muon = run.get("optimizer") == "Muon"
    found[*kind, muon] = {
        "width": width,
        "exits": exits,
        "mode": mode,
        "borrow": borrow,
        "mean": round(mean(ratios), 4),
        "low": round(min(ratios), 4),
        "high": round(max(ratios), 4),
        "seeds": len(ratios),
        "size": f"{run['layers']} layers of width {run['width']}, {1.024e-3 * run['steps']:.0f} M tokens"
        + ", Muon" * muon,
        **({"optimizer": "Muon"} if muon else {}),
    }


def second_table(records: Sequence[Record]) -> Table:
    """Rows of the second study, all of as many layers: quality, work, and predicted time at M = 2, 4, 8."""
    full = at_best_rate([r for r in records if r["run"]["steps"] == STEPS])
    groups: dict[tuple[str, bool], list[Record]] = defaultdict(list)
    for record in full:
        groups[record["run"]["row"], record["run"]["cosine"]].append(record)
    baseline, layers = by_seed(groups[BACKPROPAGATION, False]), full[0]["run"]["layers"]
    header = ["", "rate", "seeds", "held-out loss of the exits", "last exit", "to backpropagation"]
    several = any(ROWS[name].exact != BACKPROPAGATION for (name, _), group in groups.items() if group)
    header += ["to it with the same optimizer"] if several else []
    header += ["work", "time at M = 2 · 4 · 8", "time at M = 4 to the best exact schedule"]
    table = [header]
    for name, row in ROWS.items():
        for cosine in (False, True):
            group = groups.get((name, cosine))
            if not group:
                continue
            exits = [column for column in zip(*(r["curve"][-1][1] for r in group), strict=True) if None not in column]
            losses = [last_exit(r) for r in group]
            half = (max(losses) - min(losses)) / 2
            prices = [row_price(name, m, layers) for m in (2, 4, 8)]
            exact = exact_price(row.pipeline, 4)
            same = by_seed(groups[row.exact, False]) if row.exact not in (name, BACKPROPAGATION) else {}
            table.append(
                [
                    f"{name}, cosine" if cosine else name,
                    f"{group[0]['run']['rate']:g}",
                    str(len(group)),
                    " ".join(f"{mean(column):.2f}" for column in exits),
                    f"{mean(losses):.3f}" + (f" ± {half:.3f}" if len(group) > 1 else ""),
                    "–" if name == BACKPROPAGATION and not cosine else difference(by_seed(group), baseline),
                    *([difference(by_seed(group), same)] if several else []),
                    f"{prices[1].work:.2f}",
                    " · ".join(f"{p.time:.2f}" for p in prices),
                    f"{prices[1].time / exact:.2f}",
                ]
            )
    return table


def row_price(name: str, micro_batches: int, layers: int = LAYERS) -> Price:
    """Work and time of a batch against 1F1B at the row's number of stages; gradients are sent before B and W end."""
    row = ROWS[name]
    if row.delay:
        heads = len(InterlockingConfig.parse(row.block).exits_for(row.stages)) - 1
        return asynchronous_price(row.pipeline, micro_batches, heads=heads)
    if row.stages == 1:
        return Price(work=1.0, time=1.0)
    size = row.stages, layers / row.stages, STEPS
    return price(row.block, *size, micro_batches=micro_batches, backward="split")


def exact_price(stages: int, micro_batches: int) -> float:
    """Time of a batch of backpropagation with input gradients first, against 1F1B."""
    return price({"strategy": "global"}, stages, 1, STEPS, micro_batches=micro_batches, backward="split").time


def over_tokens(records: Sequence[Record], tried: Sequence[Record] = ()) -> dict[str, dict[int, dict[int, float]]]:
    """Row → batches → seed → last exit, each a training with a schedule of its own length.

    Args:
        records: of the study.
        tried: the short trainings that rates were chosen by, of which the best rate's count.
    """
    ends = by_length([*best_of(tried), *records])
    return {row: ends[row] for row in OVER_TOKENS}


def tokens_table(records: Sequence[Record], tried: Sequence[Record] = ()) -> Table:
    """What more tokens bring: backpropagation, and others to it; see :func:`over_tokens`."""
    ends = over_tokens(records, tried)
    first, *others = OVER_TOKENS
    table = [["batches", "tokens", "seeds", first, "to half as many", *(f"{row}, to it" for row in others)]]
    for steps, losses in sorted(ends[first].items()):
        half = ends[first].get(steps // 2)
        cells = [str(steps), f"{1.024e-3 * steps:.1f} M", str(len(losses)), f"{mean(losses.values()):.3f}"]
        cells.append(difference(losses, half) if half else "–")
        table.append([*cells, *(difference(ends[row].get(steps, {}), losses) for row in others)])
    return table


def equal_time_table(records: Sequence[Record]) -> Table:
    """Last exits against backpropagation with B before W that trains for the same predicted time, at M = 2, 4 and 8,
    with the same optimizer (AdamW for Nesterov's Adam).

    What backpropagation reaches in another time is read off its trainings with more and fewer batches, each with a
    schedule of its own length (straight lines between them over the logarithm of batches); "–" beyond them.
    """
    header = ["", "seeds", *(f"M = {m}: its time, then ours to it" for m in (2, 4, 8))]
    table = [header]
    ends = by_length(records)
    for name, row in ROWS.items():
        of, exact = ends[name][STEPS], ends[row.exact]
        baseline = exact[STEPS]
        if name == row.exact or len(of.keys() & baseline.keys()) < 3:
            continue
        cells = []
        for m in (2, 4, 8):
            share = row_price(name, m).time / exact_price(row.pipeline, m)
            reached = after(relative(exact), share * STEPS)
            scaled = {seed: loss * reached for seed, loss in baseline.items()} if reached else {}
            cells.append(f"{share:.2f}: {difference(of, scaled)}")
        table.append([name, str(len(of)), *cells])
    return table


def by_length(records: Sequence[Record]) -> dict[str, dict[int, dict[int, float]]]:
    """Row → batches → seed → last exit, of trainings without a cosine; each has a schedule of its own length."""
    ends: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if not record["run"]["cosine"]:
            ends[record["run"]["row"]][record["run"]["steps"]][record["run"]["seed"]] = last_exit(record)
    return ends


def best_of(tried: Sequence[Record]) -> list[Record]:
    """Of the short trainings those at each row's best rate."""
    rates = {row: lowest_rate(list(tried), row) for row in {record["run"]["row"] for record in tried}}
    return [r for r in tried if r["run"]["rate"] == rates[r["run"]["row"]]]


def relative(ends: Mapping[int, Mapping[int, float]]) -> dict[int, float]:
    """Batches → last exit against that after STEPS batches, of seed 0, which is trained at all lengths."""
    return {steps: seeds[0] / ends[STEPS][0] for steps, seeds in ends.items() if 0 in seeds}


def after(ends: Mapping[int, float], batches: float) -> float | None:
    """What was reached in so many batches, between trainings of other lengths; None beyond them."""
    below = max((steps for steps in ends if steps <= batches), default=None)
    above = min((steps for steps in ends if steps >= batches), default=None)
    if below is None or above is None:
        return None
    if below == above:
        return ends[below]
    part = log(batches / below) / log(above / below)
    return ends[below] + part * (ends[above] - ends[below])


def second_tables(of: Mapping[str, Sequence[Record]]) -> Iterator[tuple[str, Table]]:
    """Title and rows of every table that the records allow."""
    if of.get("seeds"):
        yield "text, 8 layers, three seeds", seeds_table(of["seeds"])
    tried = [*of.get("rates", ()), *of.get("late_rates", ())]
    if tried:
        yield "second study, learning rates", rates_table(tried)
    large = tuned_rows(of)
    if any(r["run"]["row"] == BACKPROPAGATION for r in large):
        yield "second study", second_table(large)
        if of.get("longer_rates"):
            yield "second study, longer rates", longer_rates_table(of["longer_rates"], of["large"])
        yield "second study, tokens", tokens_table(large, of.get("rates", ()))
        yield "second study, equal time", equal_time_table(large)
    for size, depth in DEPTHS.items():
        title = f"second study, {depth} layers of width {THIN}"
        if of.get(f"{size}_rates"):
            yield f"{title}, learning rates", rates_table(of[f"{size}_rates"])
        if any(r["run"]["row"] == BACKPROPAGATION for r in of.get(size, ())):
            yield title, second_table(of[size])
    if of.get("heads"):
        yield "second study, heads", heads_table(of["heads"], of.get("large", ()))
