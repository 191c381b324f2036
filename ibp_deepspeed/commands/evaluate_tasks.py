"""Tasks of EleutherAI's evaluation harness on every exit of a run (pip install lm-eval).

    python scripts/evaluate_tasks.py --checkpoint runs/first/checkpoint --tasks lambada_openai hellaswag
    python scripts/evaluate_tasks.py --checkpoint runs/first/family --exits 2 4 --tasks mine --include-path tasks

An export of one model needs nothing of this project: lm_eval --model hf --model_args pretrained=runs/first/hf.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ibp_deepspeed import cli
from ibp_deepspeed.errors import InterlockingError

Results = dict[int, dict[str, dict[str, Any]]]
"""Exit → task → metric → value."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, metavar="DIR", help="of train_lm.py, or an exported family")
    add("--tasks", required=True, nargs="+", metavar="NAME", help="of the harness, or of --include-path")
    add("--exits", nargs="+", type=int, metavar="K", help="which (default: all)")
    add("--include-path", type=Path, metavar="DIR", help="folder with YAML files of more tasks (default: none)")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    add("--limit", type=int, metavar="N", help="questions of each task (default: all)")
    add("--batch-size", type=int, default=8, metavar="B", help="questions at once (default: %(default)s)")
    add("--device", default="cpu", help="torch device (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures here too (default: nowhere)")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """What can be told before a model is read.

    Raises:
        InterlockingError: no harness, a device that is not there, or a file that can't be written.
    """
    from importlib.util import find_spec

    from ibp_deepspeed.atomic_files import check_target
    from ibp_deepspeed.models.devices import check_device

    if find_spec("lm_eval") is None:
        raise InterlockingError("the evaluation harness is not installed: pip install 'lm-eval>=0.4.13'.")
    for option, value in (("--limit", args.limit), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise InterlockingError(f"{option} is {value}: give at least 1.")
    if args.include_path is not None and not args.include_path.is_dir():
        raise InterlockingError(f"--include-path {args.include_path} is no folder: give one with YAML files of tasks.")
    check_device(args.device)
    if args.json is not None:
        check_target(args.json)


def table(results: Results) -> str:
    """A line for each metric of each task, a column for each exit."""
    lines = [f"{'task':>24} {'metric':>20}" + "".join(f" {f'exit {exit_}':>10}" for exit_ in results)]
    first = next(iter(results.values()))
    for task, metrics in first.items():
        for metric in metrics:
            if not metric.endswith("_stderr"):
                cells = "".join(f" {found[task][metric]:>10.4f}" for found in results.values())
                lines.append(f"{task:>24} {metric:>20}{cells}")
    return "\n".join(lines)


def as_json(results: Results) -> list[Mapping[str, Any]]:
    """A row for each exit."""
    return [{"exit": exit_, "tasks": found} for exit_, found in results.items()]


def main(phase: cli.SameOnAllRanks) -> None:
    """Run the tasks, print, write."""
    args = parse_arguments()
    cli.quiet()
    check(args)
    from ibp_deepspeed.models.exits.harness import ExitLM, check_tasks, exits_of, run_tasks

    manager = check_tasks(args.tasks, args.include_path)
    results: Results = {}
    for exit_ in args.exits or exits_of(args.checkpoint):
        model = ExitLM(args.checkpoint, exit_, device=args.device, batch_size=args.batch_size)
        results[exit_] = run_tasks(model, args.tasks, manager, limit=args.limit, num_fewshot=args.num_fewshot)
    print(table(results))
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(results), indent=1) + "\n", encoding="utf-8")


def run() -> None:
    """The command line."""
    cli.run(main)


if __name__ == "__main__":
    run()
