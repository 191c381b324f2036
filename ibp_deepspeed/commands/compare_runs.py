"""What runs reached, beside the time that their schedules need on a device for each stage.

    python scripts/compare_runs.py runs/pairwise runs/global
    python scripts/compare_runs.py --equal-time runs/pairwise runs/global    # only the number of batches

The time is simulated from the schedule and the operations of each stage, LM head or auxiliary head included, without
communication; the forward pass of a stage's decoder layers takes one unit on average. Runs are compared with the first.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ibp_deepspeed import cli
from ibp_deepspeed.errors import InterlockingError

if TYPE_CHECKING:
    from ibp_deepspeed.config.interlocking import InterlockingConfig


@dataclass(frozen=True)
class Result:
    """A run: its strategy, stages and micro-batches, batches, last held-out loss, and simulated units a batch."""

    name: str
    strategy: str
    num_stages: int
    micro_batches: int
    batches: int
    loss: float
    batch_time: float

    @property
    def time(self) -> float:
        """Units of the whole run."""
        return self.batches * self.batch_time


def read(folder: Path) -> Result:
    """The newest checkpoint of a run and the last line of its history that has held-out losses.

    Raises:
        InterlockingError: the run has none.
    """
    from ibp_deepspeed.config.interlocking import InterlockingConfig
    from ibp_deepspeed.models import CausalLM
    from ibp_deepspeed.models.runs.checkpoint import Checkpoint
    from ibp_deepspeed.models.workload import units
    from ibp_deepspeed.schedule.predict import predict_timeline
    from ibp_deepspeed.strategy.timeline import Timeline

    description = Checkpoint(folder / "checkpoint").description
    try:
        rows = [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InterlockingError(f"can't read the history of {folder}: {error.strerror}.") from None
    evaluated = [row for row in rows if "held_out" in row]
    if not evaluated:
        raise InterlockingError(f"{folder / 'history.jsonl'} has no held-out losses.")
    interlocking = InterlockingConfig.parse(description.interlocking)
    num_stages = len(description.bounds) - 1
    micro_batches = description.settings.get("gradient_accumulation_steps", 1)
    options = interlocking.aux_head
    costs = units(CausalLM(description.hf_config()), options, description.bounds, description.sequence_length)
    timeline = Timeline(interlocking, num_stages, micro_batches, aux_heads=options is not None)
    prediction = predict_timeline(timeline, costs)
    name, last = in_words(interlocking, num_stages), evaluated[-1]
    loss = math.nan if last["held_out"][-1] is None else last["held_out"][-1]
    return Result(str(folder), name, num_stages, micro_batches, last["step"], loss, prediction.batch_time)


def in_words(interlocking: InterlockingConfig, num_stages: int) -> str:
    """A strategy's name and width, which counts exits where not every stage is one."""
    exits = len(interlocking.exits_for(num_stages))
    width = min(interlocking.width_for(num_stages), exits)
    words = f"{interlocking.strategy}, N = {width} of {exits}" + (" exits" if exits < num_stages else "")
    return f"{words}, sum" if interlocking.mode == "sum" else words


def table(results: list[Result]) -> str:
    """One line a run."""
    widest = max(len(r.name) for r in results)
    what = max(20, *(len(r.strategy) for r in results))
    names = f"{'strategy':<{what}} {'batches':>8} {'held-out loss':>14} {'units a batch':>14} {'time':>7}"
    lines = [f"{'run':<{widest}}  {names}"]
    for r in results:
        lines.append(
            f"{r.name:<{widest}}  {r.strategy:<{what}} {r.batches:>8,} {r.loss:>14.3f} {r.batch_time:>14.2f} "
            f"{r.time / results[0].time:>6.2f}x"
        )
    return "\n".join(lines)


def main(phase: cli.SameOnAllRanks) -> None:
    """Read, simulate, print."""
    parser = cli.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="output folder of train_lm.py")
    parser.add_argument(
        "--equal-time",
        action="store_true",
        help="print only how many batches of the last run take the first one's time",
    )
    args = parser.parse_args()
    cli.quiet()
    results = [read(folder) for folder in args.runs]
    if args.equal_time:
        print(int(results[0].time / results[-1].batch_time))
        return
    print(table(results))
    print(
        "held-out loss of the last exit, nats per token; time: all batches, one device a stage, simulated "
        f"(micro-batches a batch: {results[0].micro_batches})"
    )


def run() -> None:
    """The command line."""
    cli.run(main)


if __name__ == "__main__":
    run()
