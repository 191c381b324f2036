"""The loop of a training run on one rank: batches, evaluations, checkpoints, progress and history."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from scripts.training.report import Speed

if TYPE_CHECKING:
    from ibp_deepspeed.data import HeldOut
    from ibp_deepspeed.pipeline import Pipeline
    from models.exits.evaluation import Evaluation
    from scripts.training.start import Data


class Run:
    """The loop of one rank; rank 0 shows and keeps what happens.

    Args:
        pipeline: the engine, or all stages in one process.
        args: the command line.
        tokens_per_batch: for tokens/s.

    Attributes:
        speed: how long the batches have taken.
    """

    def __init__(self, pipeline: Pipeline, args: argparse.Namespace, tokens_per_batch: int) -> None:
        from tqdm import tqdm

        self.pipeline, self.args, self.tokens_per_batch = pipeline, args, tokens_per_batch
        self.first = pipeline.global_rank == 0
        hidden = None if self.first else True
        options: dict[str, Any] = {"unit": "batch", "disable": hidden, "dynamic_ncols": True}
        self.bar = tqdm(total=args.steps, initial=pipeline.global_steps, **options)
        self.history = open_history(args.output / "history.jsonl", pipeline.global_steps) if self.first else None
        self.start = self.logged = self.printed = pipeline.global_steps
        self.began = time.perf_counter()
        self.speed = Speed(tokens_per_batch)

    def train(self, data: Data, save: Callable[[], None]) -> Evaluation:
        """All batches; evaluates and saves at their intervals and at the end. Returns the last evaluation."""
        evaluated: Evaluation | None = None
        for step in range(self.start + 1, self.args.steps + 1):
            began = time.perf_counter()
            self.pipeline.train_batch(data.train)
            self.speed.seconds.append(time.perf_counter() - began)
            self.show(step)
            last = step == self.args.steps
            if last or self.due(step, self.args.eval_interval):
                evaluated = self.evaluate(step, data.at_the_end if last else data.on_the_way)
            if last or self.due(step, self.args.save_interval):
                save()
        self.bar.close()
        assert evaluated is not None
        return evaluated

    @staticmethod
    def due(step: int, interval: int) -> bool:
        """Whether something is done after a batch at its interval."""
        return interval > 0 and step % interval == 0

    def evaluate(self, step: int, held_out: HeldOut) -> Evaluation:
        """Held-out losses of all exits."""
        from models.exits.evaluation import evaluate

        evaluation = evaluate(self.pipeline, held_out)
        if self.first:
            self.write({"step": step, "held_out": or_null(evaluation.losses), "tokens": evaluation.tokens})
            text = in_words(evaluation.losses)
            self.bar.write(f"batch {step}: held-out losses of the exits {text} ({evaluation.tokens:,} tokens)")
            monitor = self.pipeline.monitor
            if monitor is not None and monitor.enabled:
                samples = step * self.pipeline.train_batch_size()
                rows = evaluation.rows()
                events = [(f"Eval/Exits/stage_{row['exit'] - 1}_loss", row["loss"], samples) for row in rows]
                monitor.write_events(events)
        return evaluation

    def show(self, step: int) -> None:
        """Progress of rank 0, with the newest losses that all stages have reported."""
        if not self.first:
            return
        self.bar.update(1)
        latest = self.pipeline.latest_losses()
        if latest is None or latest[1] == self.logged:
            return
        losses, self.logged = latest
        self.write({"step": self.logged, "train": or_null(losses.tolist())})
        seconds = (time.perf_counter() - self.began) / (step - self.start)
        rate = f"{self.tokens_per_batch / seconds:,.0f} tokens/s, {seconds * 1e3:.0f} ms/batch"
        text = in_words(losses.tolist())
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


def in_words(losses: Sequence[float]) -> str:
    """Of the exits that have one."""
    return " ".join(f"{loss:.3f}" for loss in losses if not math.isnan(loss))


def or_null(losses: Sequence[float]) -> list[float | None]:
    """As JSON has them: null where a stage has none."""
    return [None if math.isnan(loss) else loss for loss in losses]


def open_history(path: Path, batches: int) -> IO[str]:
    """The file of losses, with what it has of the first ``batches`` batches."""
    kept: list[str] = []
    if batches and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= batches]
    file = path.open("w", encoding="utf-8")
    file.writelines(f"{line}\n" for line in kept)
    return file
