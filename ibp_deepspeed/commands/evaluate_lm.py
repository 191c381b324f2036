"""Perplexity of every exit of a trained model on held-out text, and how far each can be believed, in one process.

    python scripts/evaluate_lm.py --checkpoint runs/first/checkpoint
    python scripts/evaluate_lm.py --checkpoint runs/first/checkpoint --figure runs/first/early_exit.png

docs/exits.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the metric is a file beside this script

from ibp_deepspeed import cli

if TYPE_CHECKING:
    from ibp_deepspeed.models.exits.evaluation import Evaluation
    from ibp_deepspeed.models.exits.predictions import Predictions


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, metavar="DIR", help="checkpoint folder written by train_lm.py")
    add("--data", type=Path, metavar="DIR", help="prepared data (default: the data it was trained on)")
    add("--split", choices=["heldout", "train"], default="heldout", help="text to measure on (default: %(default)s)")
    add("--batch-size", type=int, default=8, metavar="B", help="samples at once (default: %(default)s)")
    add(
        "--max-batches",
        type=int,
        metavar="N",
        help="that many batches, spread over the split (default: all)",
    )
    add("--device", default="cpu", help="torch device (default: %(default)s)")
    add(
        "--memory-gib",
        type=float,
        metavar="GIB",
        help="a model that takes more than half of it is read layer by layer (default: what the device has free)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the table to this file (default: none)")
    add("--figure", type=Path, metavar="FILE", help="draw what early exit saves and costs, as a PNG (default: none)")
    return parser.parse_args()


def evaluate_exits(args: argparse.Namespace) -> tuple[Evaluation, Predictions, float]:
    """What the exits reach, what they predict, and the data's unigram entropy."""
    from ibp_deepspeed.data import HeldOut, open_tokens
    from ibp_deepspeed.data.joined import joined_entropy
    from ibp_deepspeed.models import ModelError
    from ibp_deepspeed.models.exits.evaluation import evaluate
    from ibp_deepspeed.models.exits.exits import Exits
    from ibp_deepspeed.models.exits.predictions import WatchedExits

    exits = Exits(args.checkpoint, args.device, memory_gib=args.memory_gib)
    folders = exits.description.folders if args.data is None else [args.data]
    if not folders:
        raise ModelError(f"{exits.folder} says nothing of the data it was trained on: give --data.")
    tokens = [open_tokens(folder, args.split) for folder in folders]
    for each in tokens:
        each.check_vocabulary(exits.model.vocab_size)
    samples = None if args.max_batches is None else args.max_batches * args.batch_size
    length, masks = exits.description.sequence_length, exits.description.document_masks
    held_out = HeldOut(
        tokens[0] if len(tokens) == 1 else tokens, length, args.batch_size, samples=samples, document_masks=masks
    )
    watched = WatchedExits(exits)
    evaluation = evaluate(watched, held_out, show=True)
    return evaluation, watched.predictions(), joined_entropy(tokens)


def perplexities(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A row for each exit that has a loss, by the metric beside this script: exit, loss, perplexity, tokens."""
    import evaluate

    folder = str(Path(__file__).resolve().parent / "exit_perplexity")
    rows = []
    for row in evaluation.rows():
        metric = evaluate.load(folder, experiment_id=f"{os.getpid()}-{row['exit']}")
        metric.add(predictions=row["loss"], references=evaluation.tokens)
        rows.append({"exit": row["exit"], **metric.compute()})
    return rows


def check(args: argparse.Namespace) -> None:
    """What can be told before a checkpoint is read.

    Raises:
        InterlockingError: a device that is not there, or a file that can't be written.
    """
    from ibp_deepspeed.atomic_files import check_target
    from ibp_deepspeed.models.devices import check_device
    from ibp_deepspeed.models.exits.memory import check_memory

    check_device(args.device)
    check_memory(args.memory_gib)
    for file in (args.json, args.figure):
        if file is not None:
            check_target(file)


def main(phase: cli.SameOnAllRanks) -> None:
    """Evaluate, print, write."""
    args = parse_arguments()
    cli.quiet()
    check(args)
    evaluation, predictions, entropy = evaluate_exits(args)
    from ibp_deepspeed.models.exits.confidence import confidences
    from ibp_deepspeed.models.exits.early_exit import curve, fixed_exits
    from ibp_deepspeed.models.exits.text import early_exit_table, text_table

    believed, fixed = confidences(predictions), fixed_exits(predictions)
    print(text_table(evaluation, entropy, believed))
    points = curve(predictions)
    if points:
        print("\n" + early_exit_table(points, fixed[-1].perplexity))
    if args.figure:
        from ibp_deepspeed.commands.inference.figure import draw

        draw(points, fixed, predictions.exits, args.figure)
        print(f"early exit is drawn in {args.figure}")
    if args.json:
        rows = [{**row, **asdict(believed[row["exit"]])} for row in perplexities(evaluation)]
        found = {"exits": rows, "unigram_entropy_nats": entropy, "sample": evaluation.sample}
        found["early_exit"] = [asdict(point) for point in points]
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def run() -> None:
    """The command line."""
    cli.run(main)


if __name__ == "__main__":
    run()
