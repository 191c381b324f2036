"""The learning-quality study: ``python -m benchmarks.quality STUDY``. Interrupt it and start it again at will.

Every finished training is a line of ``results/STUDY.jsonl`` with its whole configuration; those that are there are
not trained again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from pathlib import Path

from tqdm import tqdm

from benchmarks.quality.plans import PLANS
from benchmarks.quality.records import load
from benchmarks.quality.run import finish

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(PLANS))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="show what would be trained, and stop")
    args = parser.parse_args()
    path = args.results / f"{args.study}.jsonl"
    done = {record["id"] for record in load(path)}
    missing = [run for run in PLANS[args.study](args.results) if run.id not in done]
    if args.list:
        for run in missing:
            print(run.study, run.row, f"K={run.stages} rate={run.rate} seed={run.seed} steps={run.steps}", run.task)
        return
    args.results.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers, maxtasksperchild=1) as pool, path.open("a", encoding="utf-8") as file:
        for record in tqdm(pool.imap_unordered(finish, missing), total=len(missing), desc=args.study, unit="run"):
            file.write(json.dumps(record) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
