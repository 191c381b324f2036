"""From a plan to a pipeline with its data: the processes meet here."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ibp_deepspeed.commands.reporting.record import RunRecord, record_of
from ibp_deepspeed.commands.training.agreement import Agreement
from ibp_deepspeed.commands.training.arguments import EVAL_MICRO_BATCHES
from ibp_deepspeed.commands.training.checkpoints import set_position
from ibp_deepspeed.commands.training.report import (
    Machine,
    Speed,
    end_line,
    gathered_peaks,
    on_gpu,
    peak_memory,
    start_lines,
)
from ibp_deepspeed.commands.training.throughput import Throughput
from ibp_deepspeed.commands.training.training_plan import Data, TrainingPlan, few_exits

if TYPE_CHECKING:
    from ibp_deepspeed.commands.training.plan import Plan
    from ibp_deepspeed.data import HeldOut, MicroBatchLoader
    from ibp_deepspeed.data.mixture import MixtureLoader
    from ibp_deepspeed.pipeline import Pipeline


def start(plan: TrainingPlan, args: argparse.Namespace) -> Pipeline:
    """Meet the other processes and make the engine, or all stages in this process."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    from ibp_deepspeed import init_distributed, initialize
    from ibp_deepspeed.models.build import pipeline_module, virtual_pipeline

    counts = plan.token_counts()
    deepspeed.utils.logger.setLevel("INFO" if args.verbose else "WARNING")
    with contextlib.ExitStack() as stack:
        if not args.verbose:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        init_distributed()
        torch.manual_seed(args.seed + int(os.environ["RANK"]))  # dropout
        if args.one_process:
            monitor = MonitorMaster(get_monitor_config(plan.ds_config))
            device = get_accelerator().current_device_name()
            about = {"device": device, "monitor": monitor, "token_counts": counts}
            return virtual_pipeline(plan.model, plan.ds_config, plan.num_stages, plan.bounds, **about)
        module = pipeline_module(plan.model, plan.interlocking, plan.num_stages, plan.bounds, counts)
        return initialize(model=module, config=plan.ds_config)[0]


def open_data(pipeline: Pipeline, plan: Plan, args: argparse.Namespace) -> Data:
    """Training and held-out micro-batches of this rank's replica.

    Raises:
        DataError: less than one batch of data.
    """
    from ibp_deepspeed.data import HeldOut, MicroBatchLoader

    size, count = pipeline.train_micro_batch_size_per_gpu(), pipeline.gradient_accumulation_steps()
    where: dict[str, Any] = {"data_parallel_rank": pipeline.data_parallel_rank, "data_parallel_size": plan.replicas}
    position = pipeline.global_steps * count
    where["document_masks"] = plan.document_masks
    train: MicroBatchLoader | MixtureLoader
    if plan.mixture is None:
        train = MicroBatchLoader(plan.train, args.sequence_length, size, **where, seed=args.seed, start=position)
        train.samples.require(count * size * plan.replicas, "a batch")
    else:
        train = plan.mixture.loader(args.sequence_length, size, **where, seed=args.seed, start=position)
    set_position(train, plan, args)
    splits = plan.held_out if plan.mixture is None else plan.mixture.held_out

    def held_out(micro_batches: int | None) -> HeldOut:
        samples = None if micro_batches is None else micro_batches * size * plan.replicas
        return HeldOut(splits, args.sequence_length, size, **where, samples=samples)

    return Data(
        train, held_out(args.eval_micro_batches or EVAL_MICRO_BATCHES), held_out(args.eval_micro_batches or None)
    )


def describe(pipeline: Pipeline, plan: TrainingPlan, args: argparse.Namespace, data: Data) -> list[str]:
    """Say on rank 0 what is going to be trained, and what of the data is left out; returns these lines."""
    micro_batches, heads = pipeline.gradient_accumulation_steps(), sorted({0, *plan.head_parameters()})[-2:]
    head = f"{heads[-1]:,} a head" if len(set(plan.head_parameters())) < 2 else f"up to {heads[-1]:,} a head"
    lines = [
        f"{plan.num_stages} stages × {plan.replicas} replicas, layers {plan.bounds}, "
        f"{sum(plan.model.parameter_counts()):,} parameters and {head}, strategy "
        f"{plan.interlocking.strategy} ({plan.interlocking.mode}), {micro_batches} micro-batches of "
        f"{pipeline.train_micro_batch_size_per_gpu()} samples, learning rate {_learning_rate(plan)}",
        *few_exits(plan.interlocking.exits_for(plan.num_stages), plan.num_stages),
        *plan.remarks(pipeline, args, data),
    ]
    if args.eval_interval:
        lines.append(f"held-out losses every {args.eval_interval} batches on {data.on_the_way.describe()}")
    lines = [*start_lines(Machine.here(on_gpu())), *lines]
    print("\n".join(lines), flush=True)
    return lines


def remarks(pipeline: Pipeline, plan: Plan, args: argparse.Namespace, data: Data) -> list[str]:
    """What else is said of the training of a language model: where weights are from, what heads share, what is left
    out of the data."""
    from ibp_deepspeed.objectives.slow_layers import slow_rule

    options, micro_batches = plan.interlocking.aux_head, pipeline.gradient_accumulation_steps()
    if len(plan.interlocking.exits_for(plan.num_stages)) == 1:
        options = None  # no head is left
    lines = []
    if args.init_from and not plan.resume:
        heads = "at random" if args.init_heads == "fresh" else "as its final norm and LM head"
        lines.append(f"begins with the weights of {args.init_from}" + (f", heads {heads}" if options else ""))
    lines += _tuned(plan)
    lines += _experts(plan)
    if options and options.readout == "shared":
        size = "" if args.one_process else f" ({pipeline.refresh_bytes:,} bytes)"
        lines.append(
            f"the last stage's LM head{size} goes to all heads every {options.refresh_interval} batches and is used "
            f"{options.delay(plan.num_stages, micro_batches)} batches later"
        )
    lines += _late_targets(plan, micro_batches) if options else []
    rule = slow_rule(plan.interlocking, micro_batches) if options else None
    if rule is not None:
        size = "" if args.one_process else f" ({pipeline.layer_bytes:,} bytes)"
        lines.append(
            f"the average of the first layers of a stage{size} goes to the head before it every {rule.interval} "
            f"batches and is used {rule.delay} batches later"
        )
    if plan.interlocking.compile:
        lines.append("decoder layers are compiled in the first batch, which may take minutes")
    if plan.model.was_tied:
        lines.append("the LM head is not tied to the embedding: they live on different stages.")
    return [*lines, *cast("MicroBatchLoader | MixtureLoader", data.train).samples.remarks(), *data.at_the_end.remarks()]


def _late_targets(plan: Plan, micro_batches: int) -> list[str]:
    """What exits learn from the next one, if anything."""
    from ibp_deepspeed.config.objectives import DistillationOptions, LocalCriticOptions
    from ibp_deepspeed.objectives.late_targets import least_late_delay

    options = plan.interlocking.aux_head
    own = None if options is None else options.objective
    if not isinstance(own, DistillationOptions | LocalCriticOptions):
        return []
    apart = [b - a for a, b in pairwise(plan.interlocking.exits_for(plan.num_stages))]
    delay = own.delay or max(least_late_delay(stages, micro_batches) for stages in apart)
    return [
        f"exits learn from what the next exit says at up to {own.tokens} positions of a micro-batch "
        f"({own.tokens * own.position_bytes:,} bytes) {delay} batches later"
    ]


def agreement(pipeline: Pipeline, args: argparse.Namespace) -> Agreement:
    """Of all ranks about what is done after a batch."""
    import torch.distributed as dist

    store = None
    if not args.one_process:
        store = dist.PrefixStore("ibp_agreement", dist.distributed_c10d._get_default_store())
    return Agreement(store, pipeline.global_rank)


def throughput(pipeline: Pipeline, plan: TrainingPlan, args: argparse.Namespace) -> Throughput:
    """What turns times of batches into tokens/s and MFU."""
    from ibp_deepspeed.models.devices import peak_flops

    machine, tokens = Machine.here(on_gpu()), pipeline.train_batch_size() * plan.per_sample(args)
    peak = peak_flops(machine.card) if machine.card else None
    return Throughput(tokens, machine, plan.flops(args), peak, plan.counted)


def begin_record(pipeline: Pipeline, plan: TrainingPlan, args: argparse.Namespace, about: list[str]) -> RunRecord:
    """On rank 0, before the first batch: run.json, so that a run that is not finished can be reported too."""
    record = record_of(plan, args, about, pipeline.global_steps, pipeline.train_batch_size())
    record.write(args.output)
    return record


def end_record(record: RunRecord | None, output: Path, summary: str, interrupted: int) -> Path:
    """On rank 0, when all is done, or was interrupted after a batch: the page of the run; returns its path."""
    from ibp_deepspeed.commands.reporting.page import write_page

    assert record is not None
    record.ended, record.interrupted, record.summary = time.time(), interrupted, [summary]
    record.write(output)
    return write_page(output)


def summarise(speed: Speed, plan: TrainingPlan, args: argparse.Namespace) -> str:
    """All ranks together, at the end: memory, speed and MFU in words, for rank 0 to show."""
    peaks = gathered_peaks(peak_memory())
    return end_line(Machine.here(on_gpu()), speed, plan.flops(args), peaks, plan.counted) if peaks else ""


def _tuned(plan: Plan) -> list[str]:
    """What is trained, where that is not everything."""
    tuning, stages = plan.model.tuning, plan.frozen_stages
    if plan.description.tuning is None:
        return []
    counts = f"{plan.model.trained_parameters():,} of {sum(plan.model.parameter_counts()):,} parameters"
    lines = [f"{counts} are trained, and heads: {tuning}"]
    if stages:
        named = ", ".join(map(str, stages))
        who = f"stage {named} has" if len(stages) == 1 else f"stages {named} have"
        lines.append(f"{who} nothing to train but a head: no weight gradients, and no gradients sent for them")
    return lines


def _experts(plan: Plan) -> list[str]:
    """Whether experts are held in balance, where there are some."""
    from ibp_deepspeed.models.routers import SWITCH, has_experts

    config = plan.model.hf_config
    if not has_experts(config):
        return []
    if plan.model.balances_experts:
        return [f"each stage adds the loss of its own routers, with the coefficient {config.router_aux_loss_coef}"]
    return [f"nothing holds the experts in balance: --set {SWITCH}=true adds Hugging Face's loss of their routers"]


def _learning_rate(plan: TrainingPlan) -> str:
    return f"{plan.ds_config.get('optimizer', {}).get('params', {}).get('lr', 'its default')}"
