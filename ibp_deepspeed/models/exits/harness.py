"""Exits as models of EleutherAI's evaluation harness (``pip install lm-eval``).

The harness knows a checkpoint's exits by the name ``ibp``, once this module is imported::

    lm_eval.simple_evaluate("ibp", "checkpoint=runs/first/checkpoint,exit=2", tasks=["lambada_openai"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ibp_deepspeed.errors import first_line
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.exits.exits import Exits
from ibp_deepspeed.models.hf.family import Family
from ibp_deepspeed.models.tokenizer import load_tokenizer


@register_model("ibp")
class ExitLM(HFLM):  # type: ignore[misc]
    """One exit of a checkpoint, or of an exported family.

    Args:
        checkpoint: the folder, as train_lm.py or ``convert_hf.py export --all-exits`` writes it.
        exit: 1 … K; the default is the last one, the model.
        options: of ``HFLM``, such as ``batch_size``.

    Raises:
        ModelError: there is no such exit, or no tokenizer.
    """

    def __init__(self, checkpoint: str | Path, exit: int | None = None, device: str = "cpu", **options: Any) -> None:
        if Family.is_one(Path(checkpoint)):
            family = Family(Path(checkpoint))
            model = family.load(exit or family.last)
            tokenizer: str | Path | None = family.path(exit or family.last)
        else:
            exits = Exits(checkpoint)
            model, tokenizer = exits.to_hugging_face(exit), exits.checkpoint.tokenizer
        if tokenizer is None:
            raise ModelError(f"{checkpoint} has no tokenizer, nor has the data it was trained on.")
        super().__init__(model.eval().to(device), backend="causal", tokenizer=load_tokenizer(tokenizer), **options)


def exits_of(checkpoint: str | Path) -> list[int]:
    """The exits that a checkpoint or a family has, the model last."""
    if Family.is_one(Path(checkpoint)):
        return Family(Path(checkpoint)).exits
    return list(Exits(checkpoint).objectives)


def check_tasks(names: Sequence[str], include: Path | None = None) -> TaskManager:
    """What finds the tasks.

    Args:
        names: of tasks or groups.
        include: a folder with YAML files of tasks, besides the harness's own.

    Raises:
        ModelError: one that there isn't.
    """
    manager = TaskManager(include_path=None if include is None else str(include))
    missing = [name for name in names if name not in manager.all_tasks]
    if missing:
        where = "" if include is None else f" nor in {include}"
        raise ModelError(
            f"the harness has no task {missing[0]}{where}: `lm-eval ls tasks` lists its own, and a folder with YAML "
            "files of more is given as --include-path."
        )
    return manager


def run_tasks(model: ExitLM, names: Sequence[str], manager: TaskManager, **options: Any) -> dict[str, dict[str, Any]]:
    """Task → metric → value, with ``…_stderr``.

    Args:
        model: an exit.
        names: of tasks.
        manager: from :func:`check_tasks`.
        options: of ``simple_evaluate``: ``limit``, ``num_fewshot``.

    Raises:
        ModelError: a task's data can't be had.
    """
    try:
        found = simple_evaluate(model, tasks=list(names), task_manager=manager, log_samples=False, **options)
    except (OSError, ConnectionError, ValueError) as error:  # no network, no such data set, a file that is missing
        raise ModelError(f"the tasks {', '.join(names)} can't be run: {first_line(error)}") from error
    return {task: _metrics(values) for task, values in found["results"].items()}


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the names of filters where there is none."""
    return {
        key.removesuffix(",none"): value
        for key, value in values.items()
        if isinstance(value, float | int) and not isinstance(value, bool) and key not in ("sample_len", "sample_count")
    }
