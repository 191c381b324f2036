"""Draw the schedule from instructions that the real engine executed, with their time stamps.

    python benchmarks/draw_schedule.py --out docs/schedule.png

Four processes run each strategy on stages that sleep; two batches of four micro-batches are drawn, the second one
paler.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.speed.contenders import make
from benchmarks.speed.emulated import model, time_batches
from benchmarks.speed.harness import spawn
from ibp_deepspeed.schedule.instructions import AuxLoss, BackwardInput, BackwardPass, BackwardWeight, ForwardPass

STAGES, MICRO_BATCHES, UNIT = 4, 4, 0.1
KINDS = (ForwardPass, AuxLoss, BackwardInput, BackwardWeight, BackwardPass)
# by the letters of instructions
COLOURS = {"F": "#4c78a8", "L": "#e45756", "B": "#f2b447", "W": "#b8d8a8", "BW": "#54a24b"}
PANELS = {
    "N=1": "N = 1, local learning: a loss on every stage",
    "G=2": "N = 1, modules of two: a loss on every second stage",
    "N=2": "N = 2, pairwise interlocking",
    "B-W": "backpropagation, input gradients first",
    "1F1B": "backpropagation as 1F1B (N = K, B and W at once)",
}
Stamp = tuple[str, int, int, float, float]  # the instruction's letter, batch, micro-batch, start, end


def record(arguments: dict[str, Any]) -> list[Stamp]:
    """Run three batches on this rank and stamp the instructions of the last two."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    deepspeed.utils.logger.setLevel("ERROR")
    name = {"1F1B": "B-W fused"}.get(arguments["name"], arguments["name"])
    mode = {"mode": "window"} if name == "N=2" else {}
    engine: Any = make(name, replace(model(STAGES, UNIT), interlocking=mode), STAGES, MICRO_BATCHES)
    time_batches(engine, 1, warm_up=0)
    stamps: list[Stamp] = []
    put_off: dict[int, tuple[int, int]] = {}  # by the micro-batch in flight: its batch and number
    work_off = engine._work_off

    def stamped(name: str, function: Any) -> Any:
        def run(self: Any, **kwargs: Any) -> None:
            start = time.time()
            function(self, **kwargs)
            stamps.append((name, self.global_steps, kwargs.get("micro_batch", -1), start, time.time()))
            if self._due:
                put_off.setdefault(id(self._due[-1]), (self.global_steps, kwargs.get("micro_batch", -1)))

        return run

    def stamped_work(until: Any) -> None:
        start, place = time.time(), id(engine._due[0])
        work_off(until)
        stamps.append(("W", *put_off[place], start, time.time()))
        if not engine._due or id(engine._due[0]) != place:
            del put_off[place]

    engine._work_off = stamped_work
    engine._INSTRUCTION_MAP = {
        kind: stamped("" if kind is BackwardWeight else getattr(kind, "letter", ""), f)
        for kind, f in engine._INSTRUCTION_MAP.items()
    }
    time_batches(engine, 2, warm_up=0)
    engine.close()
    return stamps


def draw(rows: dict[str, list[list[Stamp]]], path: Path) -> None:
    """One panel a strategy, one line a stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, panels = plt.subplots(len(rows), 1, figsize=(11, 8.6), sharex=True, constrained_layout=True)
    for axes, (title, stages) in zip(panels, rows.items(), strict=True):
        origin = min(stamp[3] for stamps in stages for stamp in stamps)
        first = min(stamp[1] for stamps in stages for stamp in stamps)
        for stage, stamps in enumerate(stages):
            for name, batch, micro_batch, start, end in stamps:
                if name not in COLOURS:
                    continue
                left, width = (start - origin) / UNIT, (end - start) / UNIT
                alpha = 1.0 if batch == first else 0.5
                axes.barh(stage, width, left=left, color=COLOURS[name], edgecolor="white", linewidth=0.6, alpha=alpha)
                if width > 0.5:
                    axes.text(left + width / 2, stage, str(micro_batch), ha="center", va="center", fontsize=7)
        axes.set_yticks(range(STAGES), [f"stage {k}" for k in range(STAGES)], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9, loc="left")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    panels[-1].set_xlabel("time (1 = a stage's forward pass); the number is the micro-batch, paler is the next batch")
    kinds = {kind.letter: kind.meaning for kind in KINDS}
    handles = [Patch(color=colour, label=kinds[letter]) for letter, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the strategies, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/schedule.png"), metavar="FILE", help="PNG to write")
    args = parser.parse_args()
    draw({title: spawn(STAGES, record, {"name": name}) for name, title in PANELS.items()}, args.out)


if __name__ == "__main__":
    main()
