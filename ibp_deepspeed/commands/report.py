"""Make the page of a run, finished, running or failed: curves, where each stage's time went, what was predicted.

    python scripts/report.py runs/first        # writes runs/first/run_report.html, which needs no network

train_lm.py does it at the end of a run.
"""

from __future__ import annotations

from pathlib import Path

from ibp_deepspeed import cli


def main(phase: cli.SameOnAllRanks) -> None:
    """Read run.json and history.jsonl, write HTML."""
    parser = cli.parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of train_lm.py")
    args = parser.parse_args()
    cli.quiet()
    from ibp_deepspeed.commands.reporting.page import write_page

    print(f"report in {write_page(args.run)}")


def run() -> None:
    """The command line."""
    cli.run(main)


if __name__ == "__main__":
    run()
