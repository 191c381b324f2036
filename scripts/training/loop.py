"""The loop of a training run on one rank: batches, evaluations, checkpoints, progress and history."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


class Run:
    """The loop of one rank; rank 0 shows and keeps what happens.

    Args:
        engine: the engine.
        args: the command line.
        tokens_per_batch: for tokens/s.
    """

    def __init__(self, engine: Any, args: argparse.Namespace, tokens_per_batch: int) -> None:
        from tqdm import tqdm

        self.engine, self.args, self.tokens_per_batch = engine, args, tokens_per_batch
        self.first = engine.global_rank == 0
        hidden = None if self.first else True
        options = {"initial": engine.global_steps, "unit": "batch", "disable": hidden, "dynamic_ncols": True}
        self.bar = tqdm(total=args.steps, **options)
        self.history = open_history(args.output / "history.jsonl", engine.global_steps) if self.first else None
        self.start = self.logged = self.printed = engine.global_steps
        self.began = time.perf_counter()

    def train(self, train: Any, held_out: Any, save: Callable[[], None]) -> Any:
        """All batches; evaluates and saves at their intervals and at the end. Returns the last held-out losses [K]."""
        losses = None
        for step in range(self.start + 1, self.args.steps + 1):
            self.engine.train_batch(train)
            self.show(step)
            if self.due(step, self.args.eval_interval):
                losses = self.evaluate(step, held_out)
            if self.due(step, self.args.save_interval):
                save()
        self.bar.close()
        return losses

    def due(self, step: int, interval: int) -> bool:
        """Whether something is done after a batch: at its interval, and after the last one."""
        return step == self.args.steps or (interval > 0 and step % interval == 0)

    def evaluate(self, step: int, held_out: Any) -> Any:
        """Held-out losses of all exits."""
        count = min(self.args.eval_micro_batches, held_out.micro_batches_per_epoch)
        losses = self.engine.eval_batch(held_out.held_out(count), num_micro_batches=count)
        if self.first:
            self.write({"step": step, "held_out": losses.tolist()})
            text = " ".join(f"{loss:.3f}" for loss in losses.tolist())
            self.bar.write(f"batch {step}: held-out losses of the exits {text}")
            if self.engine.monitor.enabled:
                samples = step * self.engine.train_batch_size()
                events = [(f"Eval/Exits/stage_{k}_loss", x, samples) for k, x in enumerate(losses.tolist())]
                self.engine.monitor.write_events(events)
        return losses

    def show(self, step: int) -> None:
        """Progress of rank 0, with the newest losses that all stages have reported."""
        if not self.first:
            return
        self.bar.update(1)
        latest = self.engine.latest_losses()
        if latest is None or latest[1] == self.logged:
            return
        losses, self.logged = latest
        self.write({"step": self.logged, "train": losses.tolist()})
        seconds = (time.perf_counter() - self.began) / (step - self.start)
        rate = f"{self.tokens_per_batch / seconds:,.0f} tokens/s, {seconds * 1e3:.0f} ms/batch"
        text = " ".join(f"{loss:.3f}" for loss in losses.tolist())
        self.bar.set_postfix_str(f"losses {text}, {rate}")
        if self.bar.disable and step >= self.printed + max(1, self.args.steps // 20):
            self.printed = step
            print(
                f"batch {step}/{self.args.steps}: losses of the exits {text} (batch {self.logged}), {rate}", flush=True
            )

    def write(self, row: dict[str, Any]) -> None:
        """Append to history.jsonl."""
        assert self.history is not None
        self.history.write(json.dumps(row) + "\n")
        self.history.flush()


def open_history(path: Path, batches: int) -> IO[str]:
    """The file of losses, with what it has of the first ``batches`` batches."""
    kept: list[str] = []
    if batches and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= batches]
    file = path.open("w", encoding="utf-8")
    file.writelines(f"{line}\n" for line in kept)
    return file
