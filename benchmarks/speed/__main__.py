"""Benchmarks against peers, side by side: ``python -m benchmarks.speed CASE [options]``; ``CASE --help`` explains it.

Each case runs all its contenders in the same processes in interleaved repeats, prints a table, and with ``--out
FOLDER`` writes CASE.json (with the command, the versions and the machine) and CASE.png there.
"""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.speed.harness import save, table

CASES = {
    "emulated": "stages that sleep: time and idle share for K, M and N against 1F1B, DualPipeV and zero bubble",
    "latency": "the same with messages that take 0 … 4 units",
    "overhead": "stages that do nothing: what the engine itself costs",
    "compute": "a real Llama on real cores: tokens a second",
    "links": "stages on hosts of their own, joined by slow links (needs root)",
    "memory": "saved activations of a real model on each stage",
    "footprint": "what each stage of a running engine holds, beside what the planner says",
    "heads": "one head: time and peak memory against full logits",
    "split": "decoder layers: the backward pass at once, and input gradient first",
    "trace": "what recording a trace costs",
    "soak": "2,000 batches with random pauses: the parameters of one process, and nothing grows",
}


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = parser.add_subparsers(dest="case", required=True, metavar="CASE")
    modules = {name: import_module(f"benchmarks.speed.cases.{name}") for name in CASES}
    for name, module in modules.items():
        case = cases.add_parser(
            name, help=CASES[name], description=module.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(case)
        case.add_argument(
            "--out",
            type=Path,
            metavar="FOLDER",
            help="write CASE.json and CASE.png there; without it nothing is written",
        )
    args = parser.parse_args()
    module = modules[args.case]
    rows = module.run(args)
    if not rows:
        return  # the case has said why
    print(f"\n{table(rows, module.COLUMNS)}")
    if hasattr(module, "summary"):
        print(f"\n{module.summary(rows)}")
    if args.out:
        about = {key: value for key, value in vars(args).items() if key not in ("case", "out")}
        save(args.out / f"{args.case}.json", rows, **about)
        module.draw(rows, args.out / f"{args.case}.png")
        print(f"\nrecord and figure in {args.out}")


if __name__ == "__main__":
    main()
