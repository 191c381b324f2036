"""Draw the schedule from traces of the real engine.

    python benchmarks/draw_schedule.py --out docs/schedule.png

Four processes run each strategy on stages that sleep; two batches of four micro-batches are drawn, the second one
paler.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.speed.contenders import make
from benchmarks.speed.emulated import model, time_batches
from benchmarks.speed.harness import meet, spawn
from ibp_deepspeed.trace import chrome
from ibp_deepspeed.trace.picture import draw

STAGES, MICRO_BATCHES, UNIT = 4, 4, 0.1
FIRST, LAST = 2, 3
PANELS = {
    "N=1": "N = 1, local learning: a loss on every stage",
    "G=2": "N = 1, modules of two: a loss on every second stage",
    "N=2": "N = 2, pairwise interlocking",
    "B-W": "backpropagation, input gradients first",
    "B-W fused": "backpropagation as 1F1B (N = K, B and W at once)",
}


def record(arguments: dict[str, Any]) -> None:
    """Run three batches on this rank, of which the last two are traced."""
    meet()
    mode = {"mode": "window"} if arguments["name"] == "N=2" else {}
    engine: Any = make(arguments["name"], replace(model(STAGES, UNIT), interlocking=mode), STAGES, MICRO_BATCHES)
    engine.trace_batches(FIRST, LAST, arguments["path"])
    time_batches(engine, LAST, warm_up=0)
    engine.close()


def main() -> None:
    """Run the strategies, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("docs/schedule.png"),
        metavar="FILE",
        help="PNG to write (default: docs/schedule.png)",
    )
    args = parser.parse_args()
    recordings = []
    with tempfile.TemporaryDirectory() as folder:
        for name, title in PANELS.items():
            path = Path(folder) / "trace.json"
            spawn(STAGES, record, {"name": name, "path": path})
            recordings.append((title, chrome.read(path)))
    draw(recordings, UNIT, "time (1 = a stage's forward pass)").savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
