"""What each way to train a model on a pipeline costs, before it starts: time, memory, messages, extra work.

    python scripts/plan.py --model llama-tiny --stages 4 --device H100
    python scripts/plan.py --model meta-llama/Meta-Llama-3-8B --stages 8 --stages-a-host 4 --micro-batches 16 \\
        --device H100 --host-gbps 100 --zero 1 --data-parallel 4 --head negatives=16384
    python scripts/plan.py --search --model llama3-8b --devices-total 8 --devices-a-host 4 \\
        --batch-samples 64 --device A100 --host-gbps 25 --write best.json

Times are simulated from the schedules that are executed (DeepSpeed's and torch's own lists for the others), with the
operations of each stage's layers and heads, and messages of the hidden states. Nothing is run on a device; --profile
takes times that profile_stage.py has measured on one.
"""

from __future__ import annotations

import json

from ibp_deepspeed import cli
from ibp_deepspeed.atomic_files import check_target
from ibp_deepspeed.commands.planning.arguments import parse_arguments


def main(phase: cli.SameOnAllRanks) -> None:
    """Plan, and say it."""
    args = parse_arguments(__doc__)
    cli.quiet()
    from tqdm import tqdm

    from ibp_deepspeed.commands.planning.files import as_json, ds_config
    from ibp_deepspeed.commands.planning.job import make_job
    from ibp_deepspeed.commands.planning.searching import find
    from ibp_deepspeed.commands.planning.table import show
    from ibp_deepspeed.commands.training.arguments import parse_overrides
    from ibp_deepspeed.planner.advice import advise
    from ibp_deepspeed.planner.plan import candidates, evaluate

    for path in (args.json, args.write):
        if path is not None:
            check_target(path)
    if args.search:
        find(args)
        return
    job = make_job(args)
    ways = list(candidates(job.stages, parse_overrides(args.head, "--head")))
    rows = [evaluate(job, way) for way in tqdm(ways, desc="plan", leave=False, disable=None)]
    advice = advise(job, rows, args.tolerance / 100)
    show(job, rows, advice)
    if args.json is not None:
        args.json.write_text(as_json(job, rows, advice) + "\n", encoding="utf-8")
    if args.write is not None:
        args.write.write_text(json.dumps(ds_config(job, advice, args), indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.write}")


def run() -> None:
    """The command line."""
    cli.run(main)


if __name__ == "__main__":
    run()
