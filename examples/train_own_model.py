"""A model, a data set and a training loop of your own: two pipeline stages, each with a head and a loss.

    deepspeed --quiet --num_accelerators 2 examples/train_own_model.py --until 100      # start it again: it resumes

More processes are replicas, two processes each. On a machine without a GPU set DS_ACCELERATOR=cpu.
"""

import argparse
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from ibp_deepspeed import InterlockedPipelineModule, init_distributed, initialize

STAGES, MICRO_BATCHES, SAMPLES, WIDTH, BITS = 2, 4, 16, 64, 3
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": SAMPLES,
    "gradient_accumulation_steps": MICRO_BATCHES,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.005, "torch_adam": True}},
    "scheduler": {"type": "WarmupStableDecayLR", "params": {"total_num_steps": 200, "warmup_num_steps": 10}},
    "interlocking": {"strategy": "pairwise", "mode": "window"},
}


class Block(nn.Module):
    """One layer: hidden states [B, H] → [B, H]; the first one takes the dictionary that the data loader made."""

    def __init__(self, inputs: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, WIDTH)

    def forward(self, hidden: Tensor | dict[str, Tensor]) -> Tensor:
        return torch.tanh(self.linear(hidden["features"] if isinstance(hidden, dict) else hidden))


def head(stage: int) -> nn.Module:
    """What turns the hidden states at the end of a stage into the outputs of its exit; the last stage needs none."""
    return nn.Linear(WIDTH, 2**BITS)


def rows(number: int, seed: int) -> list[dict[str, Any]]:
    """Your data set: here random features, the sign of whose pairs' products decides the label."""
    features = torch.randn(number, 2 * BITS, generator=torch.Generator().manual_seed(seed))
    bits = (features[:, :BITS] * features[:, BITS:] > 0).long()
    labels = (bits * 2 ** torch.arange(BITS)).sum(-1)
    return [{"features": x, "label": label} for x, label in zip(features, labels, strict=True)]


def micro_batches(data: list[dict[str, Any]], engine: Any, start: int = 0) -> Iterator[tuple[Any, Tensor]]:
    """Endless pairs of inputs and labels from micro-batch ``start`` on: in an order drawn anew for each epoch from the
    seed, the same on all stages of a replica."""
    replicas, rank = engine.grid.get_data_parallel_world_size(), engine.data_parallel_rank
    order: Any = DistributedSampler(data, replicas, rank, shuffle=True, seed=0, drop_last=True)  # type: ignore[arg-type]
    loader: Any = DataLoader(data, SAMPLES, sampler=order, drop_last=True)  # type: ignore[arg-type]
    for epoch in count(start // len(loader)):
        order.set_epoch(epoch)
        skip = max(0, start - epoch * len(loader))
        yield from ((batch, batch["label"]) for batch in islice(loader, skip, None))


def main() -> None:
    """Train until a batch, measuring and saving every 20."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--until", type=int, default=200, metavar="N", help="last batch (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/own"), help="checkpoints (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, help="given by the launcher (default: none)")
    args = parser.parse_args()

    init_distributed()
    torch.manual_seed(dist.get_rank())  # of this stage's layers; replicas take those of the first one
    layers = [LayerSpec(Block, 2 * BITS), *[LayerSpec(Block)] * 4, LayerSpec(nn.Linear, WIDTH, 2**BITS)]
    loss_fn = nn.functional.cross_entropy
    module = InterlockedPipelineModule(layers, num_stages=STAGES, loss_fn=loss_fn, aux_head=head)
    engine, *_ = initialize(model=module, config=DS_CONFIG)
    if (args.output / "latest").exists():
        engine.load_checkpoint(args.output)

    train = micro_batches(rows(4096, seed=1), engine, start=engine.global_steps * MICRO_BATCHES)
    held_out = rows(512, seed=2)
    while engine.global_steps < args.until:
        engine.train_batch(train)  # this stage's loss
        if engine.global_steps % 20 == 0 or engine.global_steps == args.until:
            losses = engine.eval_batch(micro_batches(held_out, engine), num_micro_batches=16)  # of all exits
            engine.save_checkpoint(args.output)
            if engine.global_rank == 0:
                rate, exits = engine.get_lr()[0], " ".join(f"{loss:.4f}" for loss in losses)
                print(f"batch {engine.global_steps}: held-out losses of the exits {exits}, learning rate {rate:.4f}")


if __name__ == "__main__":
    main()
