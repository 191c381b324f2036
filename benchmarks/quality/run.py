"""One training of the study, from a description to numbers."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from benchmarks.quality.asynchronous import Asynchronous
from benchmarks.quality.gradients import cosines, sampled_gradients
from benchmarks.quality.optimizers import Optimized
from benchmarks.quality.probes import probes
from benchmarks.quality.tasks import HopTask, Task, TextTask
from ibp_deepspeed.models import CausalLM
from ibp_deepspeed.models.build import virtual_pipeline
from ibp_deepspeed.objectives.cross_entropy import LazyLogits
from ibp_deepspeed.single_process.virtual_pipeline import VirtualPipeline

SOLVED = 0.99


@dataclass(frozen=True)
class Run:
    """Everything that a training depends on.

    Attributes:
        study: the table it belongs to.
        row: the strategy's name.
        interlocking: its block.
        task: ``{"hops": p}`` or ``{"folder": …}`` with their options.
        stages, layers: K and decoder layers.
        width: hidden size; ``head_size`` of an attention head.
        rate: peak learning rate of AdamW.
        cosine, decay: the rate's shape after a warm-up: a cosine, or constant and for this last part a linear decay.
        delay: batches that gradients are late (``asynchronous.py``); None: no pipeline of that kind.
        optimizer: AdamW, or one of ``optimizers.py``.
        probes: record what each layer knows at the end (``probes.py``).
        sampled: record at the end how a loss over drawn tokens changes the gradient of the first exit's trunks.
        cosines: record how each trunk's gradient agrees with the last loss's, at each evaluation.
        steps: batches, fewer if ``until_solved`` and the last exit's accuracy is 0.99 at two evaluations.
        batch: sequences a batch; ``micro_batches`` of them is M.
    """

    study: str
    row: str
    interlocking: dict[str, Any]
    task: dict[str, Any]
    stages: int
    layers: int
    rate: float
    steps: int
    seed: int
    width: int = 32
    batch: int = 32
    micro_batches: int = 1
    cosine: bool = False
    until_solved: bool = False
    cosines: bool = False
    decay: float = 0.0
    head_size: int = 16
    delay: int | None = None
    optimizer: str = "AdamW"
    probes: bool = False
    sampled: bool = False
    evaluations: int = 20
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """A name that changes with any of the values; a new field keeps it if its default is what was done before."""
        defaults = {f.name: f.default for f in fields(self)}
        values = {key: value for key, value in asdict(self).items() if value != defaults[key] and value != {}}
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def make_task(self) -> Task:
        """The data."""
        return HopTask(**self.task) if "hops" in self.task else TextTask(**self.task)

    def settings(self) -> dict[str, Any]:
        """The DeepSpeed configuration that trains the same on K devices."""
        warmup = max(1, min(100, self.steps // 20))
        kind = "WarmupCosineLR" if self.cosine else "WarmupLR"
        schedule: dict[str, Any] = {"warmup_num_steps": warmup, "warmup_type": "linear"}
        schedule |= {"total_num_steps": self.steps, "cos_min_ratio": 0.05} if self.cosine else {}
        schedule |= {} if self.cosine else {"warmup_max_lr": self.rate}
        if self.decay:
            kind = "WarmupStableDecayLR"
            schedule |= {"total_num_steps": self.steps, "decay_share": self.decay}
        return {
            "train_micro_batch_size_per_gpu": self.batch // self.micro_batches,
            "gradient_accumulation_steps": self.micro_batches,
            "gradient_clipping": 1.0,
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": self.rate, "betas": [0.9, 0.95], "weight_decay": 0.01} | self.options,
            },
            "scheduler": {"type": kind, "params": schedule},
            "interlocking": self.interlocking,
        }


def train(run: Run, device: str = "cpu") -> dict[str, Any]:
    """Train, evaluate on the way; returns the record that is kept.

    Returns:
        ``run``, ``curve``: [step, value of each exit] (held-out loss in nats, or accuracy for hops; null: no head),
        ``steps`` trained, ``seconds``; ``probes``, ``sampled`` and ``cosines`` if asked for.
    """
    task = run.make_task()
    measure = accuracy if isinstance(task, HopTask) else None
    config = AutoConfig.for_model(
        "llama",
        vocab_size=task.vocabulary,
        hidden_size=run.width,
        intermediate_size=run.width * 8 // 3 // 8 * 8,
        num_hidden_layers=run.layers,
        num_attention_heads=run.width // run.head_size,
        num_key_value_heads=run.width // run.head_size,
        max_position_embeddings=task.sequence_length,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = CausalLM(config, seed=run.seed)
    partition = [run.layers // run.stages] * run.stages
    kind: Callable[..., VirtualPipeline] = Optimized if run.delay is None else partial(Asynchronous, delay=run.delay)
    kind = partial(kind, optimizer=run.optimizer)
    about: dict[str, Any] = {"token_counts": task.token_counts(), "kind": kind}
    pipeline = virtual_pipeline(model, run.settings(), run.stages, partition, device, **about)
    batches, held_out = task.batches(run.seed, run.batch // run.micro_batches), task.held_out()
    interval = max(1, run.steps // run.evaluations)
    curve: list[tuple[int, list[float | None]]] = []
    agreement: list[tuple[int, list[float]]] = []
    began = time.perf_counter()
    for step in range(1, run.steps + 1):
        pipeline.train_batch(batches)
        if step % interval == 0 or step == run.steps:
            curve.append((step, evaluate(pipeline, held_out, measure)))
            if run.cosines:
                agreement.append((step, cosines(pipeline.reference, *held_out[0])))
            if run.until_solved and len(curve) > 1 and all((row[-1] or 0) >= SOLVED for _, row in curve[-2:]):
                break
    seconds = round(time.perf_counter() - began, 1)
    record = {"id": run.id, "run": asdict(run), "curve": curve, "steps": curve[-1][0], "seconds": seconds}
    if run.probes:
        layers = [layer for stage in pipeline.reference.stages for layer in cast(nn.Sequential, stage)]
        record["probes"] = probes(layers, batches, held_out, task.vocabulary, run.width)
    if run.sampled:
        some = [next(batches) for _ in range(4)]
        record["sampled"] = sampled_gradients(pipeline.reference, some, task.token_counts())
    return record | ({"cosines": agreement} if run.cosines else {})


def finish(run: Run) -> dict[str, Any]:
    """:func:`train` in a worker process: one core each."""
    torch.set_num_threads(1)
    return train(run)


def evaluate(pipeline: VirtualPipeline, held_out: list[Any], measure: Any) -> list[float | None]:
    """The exits' values, null where a stage has no head."""
    values = pipeline.eval_batch(iter(held_out), len(held_out), measure).tolist()
    return [None if math.isnan(value) else round(value, 5) for value in values]


def accuracy(outputs: LazyLogits, labels: Tensor) -> Tensor:
    """Share of counted labels that are the likeliest token."""
    counted = labels >= 0
    right = (outputs.materialize().argmax(-1) == labels) & counted
    return right.sum().float() / counted.sum().clamp(min=1)
