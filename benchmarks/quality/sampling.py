"""The study ``sampling``: what a loss over drawn tokens does to the gradient of a trunk, at two vocabularies.

python scripts/prepare_data.py --input data/corpus --out data/large --vocab-size 4096
python scripts/prepare_data.py --input data/corpus --out data/large-32k --vocab-size 32768
python -m benchmarks.quality sampling
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.quality.records import Record, load
from benchmarks.quality.run import Run
from benchmarks.quality.second import LARGE, STEPS_OF_RATES, best_rate, large_run

FOLDERS = (LARGE, f"{LARGE}-32k")


def sampling(results: Path) -> Iterator[Run]:
    """A copied LM head behind the first of two modules, trained exactly."""
    tried = load(results / "rates.jsonl")
    row = "G = 2, K = 4, copied LM heads"
    rate = best_rate(tried, row)
    if rate is not None:
        run = large_run(row, rate=rate, steps=STEPS_OF_RATES, study="sampling")
        yield from (replace(run, sampled=True, task={"folder": folder}) for folder in FOLDERS)


def sampling_table(records: Sequence[Record]) -> list[list[str]]:
    """A row for each number of tokens, then how far two batches are apart; error and cosine at each vocabulary."""
    found = sorted((record["sampled"] for record in records), key=lambda of: of["vocabulary"])
    what = "difference to the exact gradient, of its norm · cosine with it"
    table = [["the loss is over the label and", *(f"of {of['vocabulary']:,}: {what}" for of in found)]]
    for size in sorted({int(size) for of in found for size in of["sizes"]}):
        pairs = [of["sizes"].get(str(size)) for of in found]
        table.append([f"{size:,} tokens", *(f"{pair[0]:.0%} · {pair[1]:.3f}" if pair else "–" for pair in pairs)])
    return [*table, ["all, of another batch", *(f"{of['batches']:.0%}" for of in found)]]
