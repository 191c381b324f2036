"""Tables and figures from the records: ``python -m benchmarks.quality.report``."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from math import isnan, log
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.pages import filled, markdown
from benchmarks.quality.figures import draw_check, draw_gap, draw_text
from benchmarks.quality.module_tables import module_tables
from benchmarks.quality.plans import TEXT_ROWS, VARIANTS
from benchmarks.quality.price import price
from benchmarks.quality.rate_tables import tuned_rows
from benchmarks.quality.records import Record, load
from benchmarks.quality.rivals import rival_tables
from benchmarks.quality.run import SOLVED
from benchmarks.quality.sampling import sampling_table
from benchmarks.quality.second_report import learned_heads, learned_rows, over_tokens, second_tables

RESULTS = Path(__file__).parent / "results"
_ORDER = [*TEXT_ROWS, *VARIANTS]
DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("learning.md", "learning-gap.md")
_PLANNER = Path(__file__).parents[2] / "ibp_deepspeed" / "planner"
LEARNED, LEARNED_HEADS = _PLANNER / "learned.json", _PLANNER / "learned_heads.json"


def hop_table(records: Iterable[Record], hops: Sequence[int]) -> list[list[str]]:
    """Rows: strategies. For each p: accuracy of the exits (mean over seeds), and in how many seeds it was solved."""
    header = ["", *(f"{p} hop{'s' * (p > 1)}: accuracy of the exits · solved (batches)" for p in hops)]
    cells: dict[str, dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        cells[record["run"]["row"]][record["run"]["task"]["hops"]].append(record)
    return [header, *([row, *(_hop_cell(of.get(p, [])) for p in hops)] for row, of in cells.items())]


def _hop_cell(records: list[Record]) -> str:
    if not records:
        return "–"
    finals = [record["curve"][-1][1] for record in records]
    exits = " ".join(
        "–" if None in column else f"{mean(column):.2f}".lstrip("0") for column in zip(*finals, strict=True)
    )
    solved = [record["steps"] for record in records if (record["curve"][-1][1][-1] or 0) >= SOLVED]
    when = f" ({mean(solved):.0f})" if solved else ""
    return f"{exits} · {len(solved)}/{len(records)}{when}"


def text_table(records: Sequence[Record], stages: int = 4) -> list[list[str]]:
    """Rows: strategies on text at K stages, with what depth is worth and what global reaches at the same price."""
    records = tuned(records)
    globals_ = _Globals([r for r in records if r["run"]["row"] == "global"])
    header = ["", "rate", "seeds", "held-out loss of the exits", "last exit", "gap to global", "share of depth's gain"]
    header += ["work", "time", "global at equal work", "global at equal time"]
    table = [header]
    shown = [r for r in records if r["run"]["stages"] == stages or r["run"]["row"] == "global"]
    for row, group in sorted(_by_row(shown), key=lambda pair: _ORDER.index(pair[0]) if pair[0] in _ORDER else 99):
        full = [r for r in group if r["run"]["layers"] == globals_.layers and r["run"]["steps"] == globals_.steps]
        if not full:
            continue
        run, last = full[0]["run"], [r["curve"][-1][1][-1] for r in full]
        cost = price(run["interlocking"], stages, run["layers"] / stages, run["steps"])
        exits = [_spread(column) for column in zip(*(r["curve"][-1][1] for r in full), strict=True)]
        table.append(
            [
                row,
                f"{run['rate']:g}",
                str(len(full)),
                " ".join(exits if run["stages"] == stages else exits[-1:]),
                _spread(last, 3),
                f"{100 * (mean(last) / globals_.full - 1):+.1f}%",
                _number(100 * globals_.share_of_depth(mean(last)), ".0f", "%"),
                f"{cost.work:.2f}",
                f"{cost.time:.2f}",
                _number(globals_.after(cost.work), ".3f"),
                _number(globals_.after(cost.time), ".3f"),
            ]
        )
    return table


def tuned(records: Sequence[Record]) -> list[Record]:
    """Those of the learning rate with which each row, with its stages, layers and batches, ended lowest on average."""
    groups: dict[tuple[Any, ...], dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        run = record["run"]
        groups[run["row"], run["stages"], run["layers"], run["steps"]][run["rate"]].append(record)
    best = (min(of.values(), key=lambda group: mean(r["curve"][-1][1][-1] for r in group)) for of in groups.values())
    kept = {id(record) for group in best for record in group}
    return [record for record in records if id(record) in kept]


def depth_table(records: Sequence[Record]) -> list[list[str]]:
    """The controls: global on the first layers only, and for a part of the batches."""
    globals_ = _Globals([r for r in tuned(records) if r["run"]["row"] == "global"])
    table = [["global on", "batches", "held-out loss"]]
    table += [[f"{layers} layers", str(globals_.steps), f"{loss:.3f}"] for layers, loss in globals_.by_depth.items()]
    others = {n: loss for n, loss in globals_.by_steps.items() if n != globals_.steps}
    return table + [[f"{globals_.layers} layers", str(n), f"{loss:.3f}"] for n, loss in others.items()]


class _Globals:
    """What backpropagation reaches, by depth and by number of batches (each with its own learning-rate schedule)."""

    def __init__(self, records: Sequence[Record]) -> None:
        ends: dict[tuple[int, int], list[float]] = defaultdict(list)
        for record in records:
            ends[record["run"]["layers"], record["run"]["steps"]].append(record["curve"][-1][1][-1])
        self.layers = max(layers for layers, _ in ends)
        self.steps = max(steps for layers, steps in ends if layers == min(depth for depth, _ in ends))
        self.by_depth = {n: mean(losses) for (n, steps), losses in sorted(ends.items()) if steps == self.steps}
        self.by_steps = {n: mean(losses) for (depth, n), losses in sorted(ends.items()) if depth == self.layers}
        self.full = self.by_depth[self.layers]

    def share_of_depth(self, loss: float) -> float:
        """1: as good as all layers, 0: as the least of them."""
        shallow = self.by_depth[min(self.by_depth)]
        return (shallow - loss) / (shallow - self.full) if shallow != self.full else float("nan")

    def after(self, share: float) -> float:
        """Loss of a training whose batches are a share of the full one's, linear in the logarithm between those done.

        Beyond the longest and below the shortest it goes on as between the nearest two, for a tenth of their batches
        and no further.
        """
        points = [(log(n / self.steps), loss) for n, loss in self.by_steps.items()]
        if len(points) < 2 or not points[0][0] - 0.1 <= log(share) <= points[-1][0] + 0.1:
            return float("nan")
        after = next((i for i, (x, _) in enumerate(points) if x >= log(share)), len(points) - 1)
        (x0, y0), (x1, y1) = points[max(0, after - 1)], points[max(1, after)]
        return y0 + (y1 - y0) * (log(share) - x0) / (x1 - x0)


def _number(value: float, form: str, unit: str = "") -> str:
    return "–" if isnan(value) else f"{value:{form}}{unit}"


def _by_row(records: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["run"]["row"]].append(record)
    return list(groups.items())


def _spread(values: Sequence[float | None], digits: int = 2) -> str:
    """Mean, and half the range if there are several."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return "–"
    half = (max(numbers) - min(numbers)) / 2
    return f"{mean(numbers):.{digits}f}" + (f" ± {half:.{digits}f}" if len(numbers) > 1 and digits > 2 else "")


def stuck_table(records: Iterable[Record]) -> list[list[str]]:
    """Agreement of each trunk's gradient with the last loss's, in the middle and at the end."""
    table = [["", "held-out loss of the exits", "cosine with the last loss's gradient, half-way", "at the end"]]
    for record in records:
        rows = record["cosines"]
        table.append(
            [
                record["run"]["row"],
                " ".join(f"{loss:.2f}" for loss in record["curve"][-1][1]),
                *(" ".join(f"{c:.2f}" for c in rows[i][1]) for i in (len(rows) // 2 - 1, -1)),
            ]
        )
    return table


def main() -> None:
    """Print the tables of all records, put them into the pages and the planner, and draw the figures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="of the records (default: benchmarks/quality/results)"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="of learning.md and figures (default: docs)")
    args = parser.parse_args()
    of = {path.stem: load(path) for path in sorted(args.results.glob("*.jsonl"))}
    for title, table in tables(of):
        print(f"{title}\n\n{markdown(table)}\n")
    for name in PAGES:
        page = args.docs / name
        page.write_text(filled(page.read_text(encoding="utf-8"), tables(of)), encoding="utf-8")
    for path, rows in ((LEARNED, learned_rows(of)), (LEARNED_HEADS, learned_heads(of))):
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if "hops" in of:
        drawn = [
            r for r in of["hops"] if (r["run"]["seed"], r["run"]["stages"]) == (0, 4) and r["run"]["task"]["hops"] < 3
        ]
        draw_check(drawn, args.docs / "learning-check.png")
    if "text" in of:
        draw_text(of["text"], args.docs / "learning-text.png")
    if "large" in of:
        probed = {r["run"]["row"]: r["probes"] for r in of["large"] if "probes" in r}
        draw_gap(over_tokens(tuned_rows(of), of.get("rates", ())), probed, args.docs / "learning-gap.png")


def tables(of: dict[str, list[Record]]) -> Iterator[tuple[str, list[list[str]]]]:
    """Title and rows of every table that the records allow; ``of`` has them by study."""
    for study, stages, title in (
        ("hops", 4, "p-hop induction, K = 4"),
        ("hops", 8, "p-hop induction, K = 8"),
        ("borrow", 2, "p-hop induction, 2 stages of 3 layers"),
    ):
        records = [r for r in of.get(study, []) if "hops" in r["run"]["task"] and r["run"]["stages"] == stages]
        if records:
            yield title, hop_table(records, sorted({r["run"]["task"]["hops"] for r in records}))
    for study, layers in (("text", 4), ("deep", 8)):
        texts = of.get(study, [])
        for stages in (4, 8, 2):
            if any(r["run"]["stages"] == stages and r["run"]["row"] != "global" for r in texts):
                yield f"text, {layers} layers, K = {stages}", text_table(texts, stages)
        if texts:
            yield f"controls, {layers} layers", depth_table(texts)
    borrowed = [r for r in of.get("borrow", []) if "folder" in r["run"]["task"]]
    if any(r["run"]["row"] == "global" for r in borrowed):
        yield "text, 3 stages of 3 layers", text_table(borrowed, 3)
    yield from second_tables(of)
    yield from module_tables(of)
    yield from rival_tables(of)
    if of.get("sampling"):
        yield "gradients over drawn tokens", sampling_table(of["sampling"])
    if of.get("stuck"):
        yield "agreement of gradients", stuck_table(of["stuck"])


if __name__ == "__main__":
    main()
