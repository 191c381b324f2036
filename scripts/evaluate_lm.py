"""Perplexity of every exit of a trained model on held-out text, in one process.

python scripts/evaluate_lm.py --checkpoint runs/first/checkpoint
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the metric is a file beside this script

from ibp_deepspeed import cli


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, metavar="DIR", help="checkpoint folder written by train_lm.py")
    add("--data", type=Path, metavar="DIR", help="prepared data (default: the data it was trained on)")
    add("--split", choices=["heldout", "train"], default="heldout", help="default: %(default)s")
    add("--batch-size", type=int, default=8, metavar="B", help="samples at once (default: %(default)s)")
    add("--max-batches", type=int, metavar="N", help="stop after N batches (default: all of the split)")
    add("--device", default="cpu", help="torch device (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the table to this file")
    return parser.parse_args()


def evaluate_exits(args: argparse.Namespace) -> tuple[list[dict[str, Any]], float]:
    """A row an exit with loss, perplexity and tokens; and the data's unigram entropy."""
    import evaluate
    from tqdm import tqdm

    from ibp_deepspeed.data import MicroBatchLoader, open_tokens
    from models import ModelError
    from models.exits.exits import Exits

    exits = Exits(args.checkpoint, args.device)
    data = args.data or exits.description.data
    if data is None:
        raise ModelError(f"{exits.folder} says nothing of the data it was trained on: give --data.")
    tokens = open_tokens(data, args.split)
    tokens.check_vocabulary(exits.model.vocab_size)
    loader = MicroBatchLoader(tokens, exits.description.sequence_length, args.batch_size, shuffle=False)
    count = min(args.max_batches or loader.micro_batches_per_epoch, loader.micro_batches_per_epoch)
    folder = str(Path(__file__).resolve().parent / "metrics" / "exit_perplexity")
    metrics = [evaluate.load(folder, experiment_id=f"{os.getpid()}-{k}") for k in range(len(exits))]
    for row, size in exits.losses(tqdm(loader.held_out(count), total=count, desc="evaluating", disable=None)):
        for metric, loss in zip(metrics, row.tolist(), strict=True):
            metric.add(predictions=loss, references=size)
    rows = [{"exit": k, **metric.compute()} for k, metric in enumerate(metrics, 1)]
    return rows, tokens.manifest.unigram_entropy_nats


def main(phase: cli.SameOnAllRanks) -> None:
    """Evaluate, print, write."""
    args = parse_arguments()
    rows, entropy = evaluate_exits(args)
    print(f"{'exit':>12} {'loss':>8} {'perplexity':>11}   held-out nats per token over {rows[-1]['tokens']:,} tokens")
    for row in rows:
        name = "model" if row["exit"] == len(rows) else f"exit {row['exit']}"
        print(f"{name:>12} {row['loss']:>8.4f} {row['perplexity']:>11.2f}")
    print(f"{'unigrams':>12} {entropy:>8.4f}   entropy of the token frequencies: below it something was learned")
    if args.json:
        args.json.write_text(json.dumps({"exits": rows, "unigram_entropy_nats": entropy}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
