"""The learning-quality study: ``python -m benchmarks.quality STUDY``. Interrupt it and start it again at will.

Every finished training is a line of ``results/STUDY.jsonl`` with its whole configuration; those that are there are
not trained again.

    python -m benchmarks.quality check     # minutes: does a wider reach build a longer circuit? with table and figure
    python scripts/prepare_data.py --whole-library --out data/quality --vocab-size 512 --max-bytes 14000000
    python -m benchmarks.quality sweep     # on that text; then text, which takes its learning rates from there
    python -m benchmarks.quality.report    # tables and figures of everything that is done
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from pathlib import Path

from tqdm import tqdm

from benchmarks.quality.figures import draw_check
from benchmarks.quality.plans import PLANS
from benchmarks.quality.records import load
from benchmarks.quality.report import hop_table, markdown
from benchmarks.quality.run import finish
from ibp_deepspeed import cli

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
CHECKED = Path("runs/learning-check")
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": 2**30, "MALLOC_TRIM_THRESHOLD_": 2**33, "MALLOC_TOP_PAD_": 2**28}
"""For glibc, bytes: logits are large, and to get their pages anew took a fifth of a training's time."""


def main(phase: cli.SameOnAllRanks) -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", metavar="STUDY", choices=sorted(PLANS), help=f"one of {', '.join(sorted(PLANS))}")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument(
        "--results",
        type=Path,
        help=f"folder of the records (default: {RESULTS.relative_to(ROOT)}, for check {CHECKED})",
    )
    parser.add_argument("--list", action="store_true", help="show what would be trained, and stop")
    args = parser.parse_args()
    args.results = args.results or (CHECKED if args.study == "check" else RESULTS)
    path = args.results / f"{args.study}.jsonl"
    done = {record["id"] for record in load(path)}
    missing = [run for run in PLANS[args.study](args.results) if run.id not in done]
    if args.list:
        for run in missing:
            print(run.study, run.row, f"K={run.stages} rate={run.rate} seed={run.seed} steps={run.steps}", run.task)
        return
    for run in {str(run.task): run for run in missing}.values():
        _ = run.make_task().vocabulary  # a text that is missing is one sentence, before any process starts
    args.results.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    os.environ.update({name: os.environ.get(name, str(size)) for name, size in KEEP_MEMORY.items()})
    with context.Pool(args.workers, maxtasksperchild=1) as pool, path.open("a", encoding="utf-8") as file:
        for record in tqdm(pool.imap_unordered(finish, missing), total=len(missing), desc=args.study, unit="run"):
            file.write(json.dumps(record) + "\n")
            file.flush()
    if args.study == "check":
        print(markdown(hop_table(load(path), (1, 2))))
        draw_check(load(path), args.results / "check.png")
        print(f"figure in {args.results / 'check.png'}")


if __name__ == "__main__":
    cli.run(main)
