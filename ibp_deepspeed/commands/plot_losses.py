"""Draw the losses of all exits from a run's history.

python scripts/plot_losses.py --run runs/first --out runs/first/losses.png
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ibp_deepspeed import cli
from ibp_deepspeed.errors import InterlockingError


def main(phase: cli.SameOnAllRanks) -> None:
    """Read history.jsonl, write a PNG."""
    parser = cli.parser(__doc__)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="output folder of train_lm.py")
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture to write (default: DIR/losses.png)")
    parser.add_argument("--unigram-entropy", type=float, metavar="X", help="draw this loss as a line (default: none)")
    args = parser.parse_args()
    try:
        rows = [json.loads(line) for line in (args.run / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InterlockingError(f"can't read the history of {args.run}: {error.strerror}.") from None
    if not rows:
        raise InterlockingError(f"{args.run / 'history.jsonl'} is empty: the run has reported no losses.")
    draw(rows, args.out or args.run / "losses.png", args.unigram_entropy)
    print(f"loss curves in {args.out or args.run / 'losses.png'}")


def draw(rows: list[dict[str, Any]], path: Path, entropy: float | None) -> None:
    """One colour an exit: training losses as lines, held-out losses as dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for kind, style in (("train", {"linewidth": 1.2}), ("held_out", {"marker": "o", "linestyle": "", "markersize": 4})):
        for exits in sorted({len(row[kind]) for row in rows if kind in row}):  # a resumed run may have other stages
            points = [(row["step"], row[kind]) for row in rows if len(row.get(kind, ())) == exits]
            for index in range(exits):
                steps, given = [step for step, _ in points], [values[index] for _, values in points]
                losses = [math.nan if loss is None else loss for loss in given]  # null: a stage without a loss
                if all(map(math.isnan, losses)):
                    continue
                name = "model" if index == exits - 1 else f"exit {index + 1} of {exits}"
                label = None if kind == "held_out" else name
                axes.plot(steps, losses, color=f"C{index}", label=label, **style)
    if entropy is not None:
        axes.axhline(entropy, color="grey", linestyle=":", label="unigram entropy")
    axes.set(xlabel="batch", ylabel="loss (nats per token)", title="Losses of all exits (dots: held out)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def run() -> None:
    """The command line."""
    cli.run(main)


if __name__ == "__main__":
    run()
