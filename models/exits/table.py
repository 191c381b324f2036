"""What each exit of a trained model costs and is worth: parameters, perplexity, tokens per second."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ibp_deepspeed.data import MicroBatchLoader, open_tokens
from ibp_deepspeed.objectives.cross_entropy import CausalLMLoss
from models.exits.exits import Exits


@torch.no_grad()
def measure(
    exits: Exits, data: str | Path, batch_size: int, max_batches: int | None = None
) -> Iterator[dict[str, Any]]:
    """For each exit, the number, held-out loss in nats per token, perplexity and tokens/s of a forward pass.

    Args:
        exits: of a checkpoint.
        data: prepared data; the split "heldout" is read.
        batch_size: samples at once.
        max_batches: as many at most.

    Raises:
        DataError: the data can't be used, or not with this vocabulary.
    """
    tokens = open_tokens(data, "heldout")
    tokens.check_vocabulary(exits.model.vocab_size)
    loader = MicroBatchLoader(tokens, exits.description.sequence_length, batch_size, shuffle=False)
    count = min(max_batches or loader.micro_batches_per_epoch, loader.micro_batches_per_epoch)
    for exit_ in [*exits.heads, len(exits)]:
        total, seen, seconds = 0.0, 0, 0.0
        batches = loader.held_out(count)
        for input_ids, labels, _ in tqdm(batches, total=count, desc=f"exit {exit_}", disable=None):
            began = time.perf_counter()
            lazy = exits.lazy_logits(input_ids, exit_)
            counted = int((labels != -100).sum())
            total += CausalLMLoss()(lazy, labels.to(exits.device)).item() * counted
            seconds += time.perf_counter() - began
            seen += counted
        loss = total / seen
        yield {
            "exit": exit_,
            "layers": exits.depth(exit_),
            "loss": loss,
            "perplexity": math.exp(loss),
            "tokens": seen,
            "tokens_per_second": count * batch_size * exits.description.sequence_length / seconds,
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, with ``parameters`` of each."""
    lines = [
        "| exit | decoder layers | parameters | held-out perplexity | tokens/s (forward pass and loss) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        layers = row["layers"]
        lines.append(
            f"| {row['exit']} | {layers} | {row['parameters']:,} | {row['perplexity']:.3f} | "
            f"{row['tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines) + "\n"
