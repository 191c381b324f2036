"""The loop of a training run on one rank: batches, evaluations, checkpoints, progress and history."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ibp_deepspeed import measures
from ibp_deepspeed.commands.reporting.files import HISTORY
from ibp_deepspeed.commands.reporting.history import History
from ibp_deepspeed.commands.training.agreement import END, EVALUATE, SAVE, STOP, Agreement
from ibp_deepspeed.commands.training.arguments import SAVE_SECONDS, save_interval
from ibp_deepspeed.commands.training.display import display_for
from ibp_deepspeed.commands.training.interruption import Interruption
from ibp_deepspeed.commands.training.report import Speed
from ibp_deepspeed.commands.training.spikes import WINDOW, SpikeWatch
from ibp_deepspeed.commands.training.spikes import in_words as spikes_in_words
from ibp_deepspeed.commands.training.throughput import Throughput
from ibp_deepspeed.json_text import parsed
from ibp_deepspeed.measures import in_words, or_null

if TYPE_CHECKING:
    from torch import Tensor

    from ibp_deepspeed.commands.training.callbacks import Callbacks
    from ibp_deepspeed.commands.training.training_plan import Data, Evaluated, HeldOutData, TrainingData
    from ibp_deepspeed.pipeline import Pipeline

_PATIENCE = 10.0  # seconds for the last reports, of stages that have trained already


class Run:
    """The loop of one rank; rank 0 shows and keeps what happens.

    Args:
        pipeline: the engine, or all stages in one process.
        args: the command line.
        throughput: what turns times into tokens/s.
        agreement: of all ranks about what is done after a batch.
        interruption: whether the training is to end.
        evaluate: all exits on held-out data, by all ranks together.
        callbacks: of the user; none on other ranks.

    Attributes:
        stopped: the batch after which an interruption ended it; 0: none did.
        ended: the batch after which callbacks had it end, before the last; 0: they did not.
        speed: how long the batches have taken.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        args: argparse.Namespace,
        throughput: Throughput,
        agreement: Agreement,
        interruption: Interruption,
        evaluate: Callable[[Pipeline, Any], Evaluated],
        callbacks: Callbacks,
    ) -> None:
        self.pipeline, self.args, self.throughput = pipeline, args, throughput
        self.agreement, self.interruption, self._evaluate = agreement, interruption, evaluate
        self.callbacks, self.first = callbacks, pipeline.global_rank == 0
        self.save_interval = save_interval(args)
        self.saved = time.monotonic()
        self.stopped = self.ended = 0
        self.display = display_for(self.first, args.steps, pipeline.global_steps)
        self.history = open_history(args.output / HISTORY, pipeline.global_steps) if self.first else None
        self.spikes = SpikeWatch()
        for _, losses in History.read(args.output).train[-WINDOW:] if self.first else ():
            self.spikes.add(losses)
        self.start = self.logged = pipeline.global_steps
        self.began = time.perf_counter()
        self.speed = Speed(throughput.tokens_per_batch)
        self.text = ""

    def train(self, data: Data, save: Callable[[], None]) -> Evaluated | None:
        """All batches; saves and evaluates at their intervals and at the end. Returns the last evaluation.

        What is trained is saved before it is evaluated. An interruption saves, and ends it.
        """
        evaluated: Evaluated | None = None
        self.callbacks.begin()
        for step in range(self.start + 1, self.args.steps + 1):
            self.callbacks.before()
            self.agreement.before(step, self.wanted)
            began = time.perf_counter()
            self.pipeline.train_batch(data.train)
            self.speed.seconds.append(time.perf_counter() - began)
            self.show(step, data.train)
            self.callbacks.after(step)
            agreed = self.agreement.after(step)
            last = step == self.args.steps or END in agreed
            if last or agreed or self.due(step, self.save_interval):
                self.save(save)
            if STOP in agreed and not last:
                self.stopped = step
                break
            due = last or EVALUATE in agreed or self.due(step, self.args.eval_interval)
            if due and self.args.eval_micro_batches != 0:
                evaluated = self.evaluate(step, data.at_the_end if last else data.on_the_way)
            if last:
                self.ended = step if step < self.args.steps else 0
                break
        self.reported(_PATIENCE)
        self.new_losses(self.pipeline.global_steps, data.train)
        self.display.close()
        self.callbacks.end()
        return evaluated

    def save(self, save: Callable[[], None]) -> None:
        """A checkpoint, by all ranks."""
        save()
        self.saved = time.monotonic()
        self.callbacks.saved()

    def wanted(self) -> set[str]:
        """What this rank wants to be done after the next batch."""
        late = self.args.save_interval is None and time.monotonic() - self.saved > SAVE_SECONDS
        asked = {word for word, is_wanted in ((SAVE, late), (STOP, self.interruption.asked)) if is_wanted}
        return asked | self.callbacks.wanted()

    @staticmethod
    def due(step: int, interval: int) -> bool:
        """Whether something is done after a batch at its interval."""
        return interval > 0 and step % interval == 0

    def evaluate(self, step: int, held_out: HeldOutData) -> Evaluated:
        """Held-out losses of all exits."""
        evaluation = self._evaluate(self.pipeline, held_out)
        if self.first:
            self.reported(_PATIENCE)  # monitors such as wandb want steps in their order
            self.write({"step": step, **evaluation.row()})
            self.display.say(f"batch {step}: {evaluation.in_words()}")
            monitor = self.pipeline.monitor
            if monitor is not None and monitor.enabled:
                monitor.write_events(evaluation.events(step))
        self.callbacks.evaluated(evaluation)
        return evaluation

    def new_losses(self, step: int, train: TrainingData) -> Tensor | None:
        """On rank 0, behind batch ``step``: look at all losses that have come, and say which have jumped; returns the
        newest."""
        known = self.pipeline.losses_after(self.logged) if self.first else []
        for losses, self.logged in known:
            spikes = self.spikes.add(losses.tolist())
            if spikes:
                micro_batches = self.pipeline.gradient_accumulation_steps()
                ids = train.sample_ids((step - self.logged + 1) * micro_batches, micro_batches)
                rows = [{"exit": s.stage + 1, "loss": s.loss, "median": s.median} for s in spikes]
                self.write({"step": self.logged, "spikes": rows, "samples": ids})
                self.display.say(spikes_in_words(self.logged, spikes, ids))
        return known[-1][0] if known else None

    def drawn(self, step: int, train: TrainingData) -> str:
        """Of a mixture: keep how many tokens of each source batch ``step`` had; returns their shares in words."""
        from ibp_deepspeed.data.mixture import MixtureLoader

        if not isinstance(train, MixtureLoader):
            return ""
        micro_batches = self.pipeline.gradient_accumulation_steps()
        tokens = train.drawn(micro_batches, micro_batches)
        self.write({"step": step, "drawn": tokens})
        return ", of " + " ".join(f"{name} {n / sum(tokens.values()):.0%}" for name, n in tokens.items())

    def show(self, step: int, train: TrainingData) -> None:
        """Progress of rank 0, with the newest losses that all stages have reported."""
        if not self.first:
            return
        drawn = self.drawn(step, train)
        losses = self.new_losses(step, train)
        if losses is not None:
            row = or_null(losses.tolist())
            self.write({"step": self.logged, "train": row})
            self.callbacks.logged(self.logged, row)
            seconds, left = self.speed.recent(), timedelta(seconds=round(self.seconds_left(step)))
            speed = f"{self.throughput.tokens_per_batch / seconds:,.0f} {self.throughput.counted}/s"
            rate = f"{speed}, {seconds * 1e3:.0f} ms/batch"
            known = f"losses of the exits {in_words(losses.tolist())} (batch {self.logged}){drawn}"
            self.text = f"{known}, {rate}, {left} left"
        self.display.advance(self.text)
        self.reported()

    def seconds_left(self, step: int) -> float:
        """Until the last batch, if batches go on as fast as the newest, and what is done between them as often."""
        between = time.perf_counter() - self.began - sum(self.speed.seconds)
        return (self.args.steps - step) * (self.speed.recent() + between / (step - self.start))

    def reported(self, patience: float = 0.0) -> None:
        """Keep and show what all stages have measured; with patience, also of stages that are about to say it."""
        monitor = self.pipeline.monitor
        for report in self.pipeline.new_reports(patience):
            speeds = self.throughput.of(report)
            stages = [{**stage, **speed} for stage, speed in zip(report.stages, speeds, strict=True)]
            left = self.seconds_left(self.pipeline.global_steps)
            self.write({"step": report.step, "seconds_left": round(left, 1), "stages": stages})
            self.display.report(report.step, stages, self.text)
            if monitor is not None and monitor.enabled:
                monitor.write_events(measures.events(report.step, speeds))

    def write(self, row: dict[str, Any]) -> None:
        """Append to history.jsonl, with the time in seconds since 1970."""
        assert self.history is not None
        self.history.write(json.dumps({"time": round(time.time(), 3), **row}) + "\n")
        self.history.flush()


def open_history(path: Path, batches: int) -> IO[str]:
    """The file of losses, with what it has of the first ``batches`` batches."""
    kept: list[str] = []
    if batches and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= batches]
    file = path.open("w", encoding="utf-8")
    file.writelines(f"{line}\n" for line in kept)
    file.flush()
    return file


def _step_of(line: str) -> float:
    """The batch of a row; of one that is cut off, or none of ours, infinity."""
    try:
        return float(parsed(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return math.inf
