"""Where the time of traced batches went: bubble, waits by cause, overlap, beside the schedule's prediction.

    deepspeed --num_accelerators 4 scripts/train_lm.py … --output runs/first --trace 11:13
    python scripts/trace_report.py runs/first --picture runs/first/trace.png

The trace itself, runs/first/trace.json, opens in https://ui.perfetto.dev and chrome://tracing.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ibp_deepspeed import cli
from ibp_deepspeed.errors import OutputError, TraceError

if TYPE_CHECKING:
    from ibp_deepspeed.trace.report import Report, StageTime, Wait
    from ibp_deepspeed.trace.spans import Recording

_PIECES = {"F": "F", "B": "B", "Q": "B of borrowed layers", "W": "W", "BW": "B and W", "L": "head"}
_TELLING = 1e-3
"""Share of a batch from which on a wait is worth a line."""


def parse_arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("trace", type=Path, metavar="RUN", help="output folder of train_lm.py --trace, or a trace")
    parser.add_argument("--replica", type=int, default=0, metavar="R", help="which pipeline (default: %(default)s)")
    parser.add_argument("--waits", type=int, default=8, metavar="N", help="list the longest N (default: %(default)s)")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw stages × time: PNG, SVG or PDF (default: none)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, in seconds (default: nowhere)")
    return parser.parse_args()


def show(recording: Recording, report: Report, most_waits: int) -> None:
    """Tables of where each stage's time went, and of what was waited for."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    measured, predicted = report.batch_time, report.predicted.batch_time
    console.print(
        f"batches {recording.first} to {recording.last}, {recording.stages} stages, {recording.micro_batches} "
        f"micro-batches: {1e3 * measured:.4g} ms a batch; the schedule with these pieces of work and messages makes "
        f"{1e3 * predicted:.4g} ms ({measured / predicted - 1:+.1%})",
        soft_wrap=True,
    )
    letters = [letter for letter in _PIECES if any(letter in stage.computing for stage in report.stages)]
    table = Table("share of the time, %", "bubble", "predicted", *(_PIECES[letter] for letter in letters))
    for title in ("waiting for activations", "gradients", "credit", "replicas", "data, sending, step", "the rest"):
        table.add_column(title)
    for stage in report.stages:
        table.add_row(*cells(stage, report.predicted.idle[stage.stage], letters))
    console.print(table)
    if report.overlap is not None:
        console.print(
            f"{report.overlap:.1%} of the time that messages were under way was hidden behind computing; clocks agree "
            f"within {1e6 * report.uncertainty:.0f} µs",
            soft_wrap=True,
        )
    waits = [wait for stage in report.stages for wait in stage.waits if wait.seconds > _TELLING * report.batch_time]
    for wait in sorted(waits, key=lambda wait: -wait.seconds)[:most_waits]:
        console.print(sentence(wait), soft_wrap=True)


def cells(stage: StageTime, predicted: float, letters: list[str]) -> list[str]:
    """A row of the table."""
    waits = {cause: 0.0 for cause in ("activations", "gradients", "credit", "replicas")}
    for wait in stage.waits:
        waits[wait.cause] += wait.seconds
    shares = [
        *(stage.computing.get(letter, 0.0) for letter in letters),
        *waits.values(),
        sum(stage.other.values()),
        stage.between,
    ]
    return [
        f"stage {stage.stage}",
        f"{100 * stage.bubble:.1f}",
        f"{100 * predicted:.1f}",
        *(f"{100 * seconds / stage.seconds:.1f}" for seconds in shares),
    ]


def sentence(wait: Wait) -> str:
    """Who waited for what from whom, and when longest."""
    span = wait.longest
    what = f"{wait.cause} from stage {wait.peer}"
    if wait.peer is None:
        what = "the other replicas"
    elif wait.cause == "credit":
        what = f"stage {wait.peer} to have received enough"
    when = f"batch {span.batch}" if span.micro_batch < 0 else f"micro-batch {span.micro_batch} of batch {span.batch}"
    return (
        f"stage {wait.stage} waited {1e3 * wait.seconds:.4g} ms a batch for {what}; longest "
        f"{1e3 * span.seconds:.4g} ms, {when}"
    )


def main(phase: cli.SameOnAllRanks) -> None:
    """Read, analyse, show, write."""
    args = parse_arguments()
    cli.quiet()
    from ibp_deepspeed.commands.training.trace import FILE
    from ibp_deepspeed.trace import chrome
    from ibp_deepspeed.trace.picture import draw
    from ibp_deepspeed.trace.report import analyse

    recording = chrome.read(args.trace / FILE if args.trace.is_dir() else args.trace)
    replicas = {process.replica for process in recording.processes}
    if args.replica not in replicas:
        raise TraceError(f"--replica {args.replica}: the trace has replicas {min(replicas)} to {max(replicas)}.")
    report = analyse(recording, args.replica)
    show(recording, report, args.waits)
    try:
        if args.json is not None:
            args.json.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        if args.picture is not None:
            draw([(str(args.trace), recording)]).savefig(args.picture, dpi=130)
            print(f"stages × time in {args.picture}")
    except (OSError, ValueError) as error:  # matplotlib: an ending that it does not know
        raise OutputError(f"can't write {args.picture or args.json}: {error}") from error


def run() -> None:
    """The command line."""
    cli.run(main)


if __name__ == "__main__":
    run()
