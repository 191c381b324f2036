"""What each exit of a trained model costs and is worth: parameters, perplexity, tokens per second."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from ibp_deepspeed.batches import position_ids
from ibp_deepspeed.data import HeldOut
from ibp_deepspeed.documents import Documents, reading
from ibp_deepspeed.models.exits.evaluation import evaluate
from ibp_deepspeed.models.exits.exits import Exits

_TIMED_MICRO_BATCHES = 16


def measure(exits: Exits, held_out: HeldOut) -> Iterator[dict[str, Any]]:
    """For each exit, the number, held-out loss in nats per token, perplexity and tokens/s of a forward pass with loss.

    The speed is None where layers are read anew in every pass, which would be what is timed.

    Args:
        exits: of a checkpoint.
        held_out: what the losses are measured on; speed is on its first micro-batches.
    """
    for row in evaluate(exits, held_out, show=True).rows():
        speed = None if exits.is_streamed else _speed(exits, row["exit"], held_out)
        layers = {"layers": exits.depth(row["exit"]), "shared_layers": exits.shared_layers(row["exit"])}
        yield {**row, **layers, "tokens_per_second": speed}


@torch.no_grad()
def _speed(exits: Exits, exit_: int, held_out: HeldOut) -> float:
    tokens, seconds = 0, 0.0
    for micro_batch in islice(held_out, _TIMED_MICRO_BATCHES):
        input_ids, labels, *_ = micro_batch
        began = time.perf_counter()
        with reading(Documents.of(position_ids(micro_batch), exits.device)):
            logits = exits.lazy_logits(input_ids, exit_)
        exits.objectives[exit_].measure(logits, labels.to(exits.device)).item()
        seconds += time.perf_counter() - began
        tokens += input_ids.numel()
    return tokens / seconds


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, with ``parameters`` of each."""
    lines = [
        "| exit | decoder layers | parameters | held-out perplexity | tokens/s (forward pass and loss) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        layers, speed = row["layers"], row["tokens_per_second"]
        lines.append(
            f"| {row['exit']} | {layers} | {row['parameters']:,} | {row['perplexity']:.3f} | "
            f"{'–' if speed is None else format(speed, ',.0f')} |"
        )
    return "\n".join(lines) + "\n"
