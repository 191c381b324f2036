"""transformers' callbacks on our loop: a ``TrainerCallback`` of a user's works as it is, on rank 0.

They see transformers' own ``TrainerState`` and ``TrainerControl``, and ``TrainingArguments`` with the values of the
run. What a callback asks for (to stop, save or evaluate) all ranks do after the next batch that rank 0 has not begun.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ibp_deepspeed.commands.training.agreement import END, EVALUATE, SAVE
from ibp_deepspeed.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ibp_deepspeed.commands.training.training_plan import Evaluated
    from ibp_deepspeed.pipeline import Pipeline

METRIC = "eval_loss"
"""Of the last exit, which is the model: what early stopping looks at."""


class Callbacks:
    """Those of a run, on the rank that calls them.

    Args:
        callbacks: made.
        args: the command line.
        pipeline: given to them as ``pipeline``, and this rank's stage as ``model``.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback], args: argparse.Namespace, pipeline: Pipeline) -> None:
        self._callbacks = list(callbacks)
        if not callbacks:
            return
        from transformers import TrainerControl, TrainerState

        self._arguments = training_arguments(args, pipeline)
        self._more = {"pipeline": pipeline, "model": getattr(pipeline, "module", None)}
        self._control = TrainerControl()
        self._state = TrainerState(max_steps=args.steps, global_step=pipeline.global_steps)
        self._state.is_world_process_zero = self._state.is_local_process_zero = True

    def begin(self) -> None:
        """Before the first batch."""
        self._call("on_train_begin")

    def before(self) -> None:
        """Before a batch."""
        self._call("on_step_begin")

    def after(self, step: int) -> None:
        """Behind batch ``step``."""
        if self._callbacks:
            self._state.global_step = step
        self._call("on_step_end")

    def logged(self, step: int, losses: Sequence[float | None]) -> None:
        """Losses of the exits (None: it has none) in batch ``step``, the newest that all stages have reported."""
        self._call("on_log", logs=self._noted({"step": step, **_named("loss", losses)}))

    def evaluated(self, found: Evaluated) -> None:
        """Held-out losses; the lowest of the model is ``best_metric`` from then on."""
        metrics = metrics_of(found.row())
        self._call("on_evaluate", metrics=self._noted(metrics))
        if self._callbacks and (self._state.best_metric is None or metrics[METRIC] < self._state.best_metric):
            self._state.best_metric, self._state.best_global_step = metrics[METRIC], self._state.global_step

    def saved(self) -> None:
        """A checkpoint was written."""
        self._call("on_save")

    def end(self) -> None:
        """Behind the last batch."""
        self._call("on_train_end")

    def wanted(self) -> set[str]:
        """What they have asked for since the last time."""
        if not self._callbacks:
            return set()
        control = self._control
        asked = {END: control.should_training_stop, SAVE: control.should_save, EVALUATE: control.should_evaluate}
        control.should_save = control.should_evaluate = False
        return {word for word, is_asked in asked.items() if is_asked}

    def _noted(self, values: dict[str, float]) -> dict[str, float]:
        """A copy is in the state's history."""
        if self._callbacks:
            self._state.log_history.append({"step": self._state.global_step, **values})
        return values

    def _call(self, event: str, **more: Any) -> None:
        for callback in self._callbacks:
            given = getattr(callback, event)(self._arguments, self._state, self._control, **self._more, **more)
            self._control = given or self._control


def make_callbacks(args: argparse.Namespace) -> list[TrainerCallback]:
    """Those of --callbacks and --early-stopping-patience, made on every rank, so that a mistake ends the job early.

    Raises:
        ConfigError: a name that can't be imported, or that is no TrainerCallback.
    """
    if not args.callbacks and args.early_stopping_patience is None:
        return []
    from transformers import EarlyStoppingCallback

    made: list[TrainerCallback] = [_make(name) for name in args.callbacks]
    if args.early_stopping_patience is not None:
        if args.early_stopping_patience < 1:
            raise ConfigError(f"--early-stopping-patience is {args.early_stopping_patience}: give at least 1.")
        if args.eval_micro_batches == 0:
            raise ConfigError("--early-stopping-patience needs evaluations, and --eval-micro-batches 0 asks for none.")
        made.append(EarlyStoppingCallback(args.early_stopping_patience))
    return made


def _make(name: str) -> TrainerCallback:
    from transformers import TrainerCallback

    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f"--callbacks {name}: write it as module:Class, such as mine:Notify for mine.py beside you.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m has it
    try:
        found = getattr(importlib.import_module(module), attribute)
        callback = found()
    except Exception as error:  # a user's module may fail with any kind of error
        raise ConfigError(f"--callbacks {name} can't be made: {first_line(error)}.") from error
    if not isinstance(callback, TrainerCallback):
        raise ConfigError(f"--callbacks {name} is a {type(callback).__name__}, not a transformers.TrainerCallback.")
    return callback


def training_arguments(args: argparse.Namespace, pipeline: Pipeline) -> Any:
    """transformers' TrainingArguments with the values of a run, for what a callback reads from it."""
    from transformers import TrainingArguments

    steps = max(args.eval_interval, 1)
    return TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=pipeline.train_micro_batch_size_per_gpu(),
        gradient_accumulation_steps=pipeline.gradient_accumulation_steps(),
        eval_strategy="no" if args.eval_micro_batches == 0 else "steps",
        eval_steps=steps,
        seed=args.seed,
        metric_for_best_model=METRIC,
        greater_is_better=False,
        report_to=[],
        use_cpu=True,  # it is not to take a device of its own
    )


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The history's row of an evaluation by transformers' names: ``eval_loss`` of the model, ``eval_loss_exit_1``, …"""
    lists = {"loss" if name == "held_out" else name: each for name, each in row.items() if isinstance(each, list)}
    return {key: value for name, values in lists.items() for key, value in _named(f"eval_{name}", values).items()}


def _named(name: str, values: Sequence[float | None]) -> dict[str, float]:
    exits = {f"{name}_exit_{k}": value for k, value in enumerate(values, 1) if value is not None}
    return exits if values[-1] is None else {name: values[-1], **exits}
