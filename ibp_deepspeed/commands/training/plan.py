"""What a training consists of, checked as far as one process can before the processes meet."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from ibp_deepspeed.commands.planning.subject import check_positions
from ibp_deepspeed.commands.training.arguments import (
    default_hyperparameters,
    given_hyperparameters,
    parse_overrides,
)
from ibp_deepspeed.commands.training.monitors import check_monitors, monitors_under
from ibp_deepspeed.commands.training.output import check_output
from ibp_deepspeed.commands.training.partition import stage_bounds

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ibp_deepspeed.commands.training.mixture import Mixture
    from ibp_deepspeed.config.interlocking import InterlockingConfig
    from ibp_deepspeed.data import TokenFile
    from ibp_deepspeed.models import CausalLM
    from ibp_deepspeed.models.runs.conditions import Changes, Conditions
    from ibp_deepspeed.models.runs.description import Description
    from ibp_deepspeed.models.runs.start import StartingPoint
    from ibp_deepspeed.models.tuning import Tuning


@dataclass
class Plan:
    """What a run consists of.

    Attributes:
        ds_config: the DeepSpeed configuration, without "auto".
        interlocking: its block.
        model: the cut model.
        num_stages: K.
        bounds: stage k has layers bounds[k] … bounds[k+1]-1.
        replicas: data-parallel ranks.
        train, held_out: the two splits of the data; of a mixture those of its first source.
        mixture: the sources where they are several; None: one.
        document_masks: whether documents are kept apart.
        description: what goes beside a checkpoint's files.
        resume: the tag of the checkpoint to resume from.
        files: texts that go into every checkpoint, by file name.
        changes: how the run differs from the one that wrote the checkpoint; None without one.
    """

    ds_config: dict[str, Any]
    interlocking: InterlockingConfig
    model: CausalLM
    num_stages: int
    bounds: list[int]
    replicas: int
    train: TokenFile
    held_out: TokenFile
    mixture: Mixture | None
    document_masks: bool
    description: Description
    resume: str | None
    files: dict[str, str]
    changes: Changes | None = None

    @property
    def frozen_stages(self) -> tuple[int, ...]:
        """Those with nothing to train but a head."""
        return self.model.tuning.frozen_stages(self.bounds)

    @property
    def unigram_entropy(self) -> float:
        """Of the held-out data, in nats per token."""
        from ibp_deepspeed.data.joined import joined_entropy

        return joined_entropy([self.train] if self.mixture is None else self.mixture.train)


def make_plan(args: argparse.Namespace) -> Plan:
    """Check everything that can be checked alone, before the processes meet.

    Raises:
        InterlockingError: one sentence about the first thing that is wrong.
    """
    from ibp_deepspeed.checkpoint import layout
    from ibp_deepspeed.commands.training.mixture import open_mixture
    from ibp_deepspeed.config.auto import fill_auto
    from ibp_deepspeed.config.deepspeed import load_ds_config, resolve_interlocking
    from ibp_deepspeed.data import open_tokens
    from ibp_deepspeed.data.token_file import SplitName
    from ibp_deepspeed.models import CausalLM
    from ibp_deepspeed.models.build import router_loss
    from ibp_deepspeed.models.runs.checkpoint import tokenizer_texts
    from ibp_deepspeed.models.runs.conditions import Conditions
    from ibp_deepspeed.models.runs.resume import checkpoint_to_resume
    from ibp_deepspeed.models.tuning import check_something_is_trained
    from ibp_deepspeed.strategy.timeline import Timeline

    check_output(args)
    num_stages, replicas = _processes(args)
    first = os.environ["RANK"] == "0"
    ds_config = load_ds_config(args.deepspeed_config)
    interlocking = resolve_interlocking(ds_config)
    reads = os.environ.get("LOCAL_RANK", "0") == "0"  # each host may have a copy of its own
    mixture = open_mixture(args, verify=reads)
    if mixture is None:
        train, held_out = (open_tokens(args.data, split, verify=reads) for split in get_args(SplitName))
    else:
        train, held_out = mixture.train[0], mixture.held_out[0]
    begin = _starting_point(args, train.manifest.vocabulary_size)
    _check_lengths(args, begin.hf_config)
    tuning = _tuning(args, begin)
    model = CausalLM(begin.hf_config, seed=args.seed, tuning=tuning)
    for each in (train,) if mixture is None else mixture.train:
        each.check_vocabulary(model.vocab_size)
    splits = (train, held_out) if mixture is None else (*mixture.train, *mixture.held_out)
    document_masks = _keeps_documents_apart(args, splits, model)
    _check_heads(interlocking, model.vocab_size)
    defaults = default_hyperparameters(args, model.hidden_size)
    ds_config = _checked(fill_auto(ds_config, given_hyperparameters(args), defaults, replicas), replicas)
    micro_batches = ds_config["gradient_accumulation_steps"]
    heads = interlocking.exits_for(num_stages)[:-1] if interlocking.aux_head is not None else ()
    check_something_is_trained(tuning, model.num_layers, heads)
    router_loss(model, interlocking)  # refuses what it does not go with
    Timeline(interlocking, num_stages, micro_batches, interlocking.aux_head is not None).channel_depth()
    if first:
        _check_amount(args, ds_config, replicas, train, held_out, document_masks, mixture)
        _warn_of_unknown_keys(ds_config)
        _warn_of_schedule(ds_config, args.steps)
        _warn_of_mode(interlocking, num_stages)
    bounds = stage_bounds(args, model, interlocking, num_stages, ds_config)
    shares = () if mixture is None else mixture.shared()
    conditions = Conditions.of(train, args.seed, ds_config, replicas, document_masks, shares)
    description = _description(args, ds_config, model, bounds, interlocking, train, conditions, mixture)
    files = {**description.files(), **begin.files, **tokenizer_texts(args.data / layout.TOKENIZER)}
    folder, allowed = args.output / "checkpoint", args.allow_changed or ()
    resumption = checkpoint_to_resume(folder, args.resume, description, args.steps, allowed)
    resume, changes = resumption or (None, None)
    if begin.weights is not None and (resume is None or tuning.lora is not None):  # a checkpoint has adapters alone
        fresh = args.init_heads == "fresh"
        model = CausalLM(begin.hf_config, seed=args.seed, weights=begin.weights, fresh_heads=fresh, tuning=tuning)
    ds_config = monitors_under(args.output, ds_config)
    return Plan(
        ds_config,
        interlocking,
        model,
        num_stages,
        bounds,
        replicas,
        train,
        held_out,
        mixture,
        document_masks,
        description,
        resume,
        files,
        changes,
    )


def _checked(ds_config: dict[str, Any], replicas: int) -> dict[str, Any]:
    """The whole DeepSpeed JSON, but for the interlocking block; returns it with all three batch sizes."""
    from ibp_deepspeed.config.batch_sizes import with_batch_sizes
    from ibp_deepspeed.config.deepspeed import check_blocks, check_ds_config
    from ibp_deepspeed.optimizer.configured import check_optimizer
    from ibp_deepspeed.optimizer.learning_rate import check_schedule

    check_ds_config(ds_config)
    complete = with_batch_sizes(ds_config, replicas)
    check_optimizer(complete)
    check_schedule(complete)
    check_monitors(complete)
    check_blocks(complete)
    return complete


def _description(
    args: argparse.Namespace,
    ds_config: dict[str, Any],
    model: CausalLM,
    bounds: list[int],
    interlocking: InterlockingConfig,
    train: TokenFile,
    conditions: Conditions,
    mixture: Mixture | None,
) -> Description:
    from ibp_deepspeed.models.routers import SWITCH
    from ibp_deepspeed.models.runs.description import Description
    from ibp_deepspeed.models.tuning import EVERYTHING

    return Description(
        model=model.hf_config.to_dict() | ({SWITCH: True} if model.balances_experts else {}),
        bounds=bounds,
        interlocking=interlocking.model_dump(exclude_unset=True),
        sequence_length=args.sequence_length,
        data=str(args.data),
        mixture=None if mixture is None else dict(zip(map(str, mixture.folders), mixture.shares, strict=True)),
        source=train.manifest.source if mixture is None else mixture.describe(),
        init_from=args.init_from,
        tuning=None if model.tuning == EVERYTHING else model.tuning,
        settings={key: value for key, value in ds_config.items() if key != "interlocking"},
        conditions=conditions,
    )


def _processes(args: argparse.Namespace) -> tuple[int, int]:
    """K, and replicas, of the processes that a launcher started, or of this one alone."""
    from ibp_deepspeed.models.errors import ModelError

    if args.one_process:
        _become_only_process(args.stages)
        return args.stages, 1
    if "RANK" not in os.environ:
        raise ModelError(
            "train_lm.py needs a launcher (deepspeed --num_accelerators 4 scripts/train_lm.py …; where the package is "
            "installed: deepspeed --num_accelerators 4 --module ibp_deepspeed.commands.train_lm …) or --one-process."
        )
    world = int(os.environ["WORLD_SIZE"])
    num_stages = world if args.stages is None else args.stages
    if num_stages < 1:
        raise ModelError(f"--stages is {num_stages}: give at least 1, or leave it out for a stage in each process.")
    if world % num_stages:
        raise ModelError(f"{world} processes can't be divided into pipelines of {num_stages} stages: start a multiple.")
    return num_stages, world // num_stages


def _become_only_process(num_stages: int | None) -> None:
    """What a launcher would have said to a single process."""
    from ibp_deepspeed.models.errors import ModelError

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ModelError(f"--one-process was started as {os.environ['WORLD_SIZE']} processes: leave the launcher out.")
    if num_stages is None or num_stages < 1:
        was = "" if num_stages is None else f", which is {num_stages}"
        raise ModelError(f"--one-process needs --stages K, the number of pipeline stages to train, from 1 on{was}.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", port)


def _starting_point(args: argparse.Namespace, vocabulary_size: int) -> StartingPoint:
    """The config and weights of --model or --init-from."""
    from ibp_deepspeed.checkpoint import layout
    from ibp_deepspeed.models.runs.start import pretrained_start, random_start

    overrides = parse_overrides(args.set)
    if args.init_from is None:
        return random_start(args.model, {"vocab_size": vocabulary_size, **overrides})
    first = os.environ["RANK"] == "0"
    return pretrained_start(args.init_from, overrides, args.data / layout.TOKENIZER if first else None)


def _tuning(args: argparse.Namespace, begin: StartingPoint) -> Tuning:
    """What --freeze and --lora mean for a model, before peft's targets are known.

    Raises:
        ModelError: they can't be read, or there are no weights for adapters.
    """
    from ibp_deepspeed.models.errors import ModelError
    from ibp_deepspeed.models.runs.base import weights_digest
    from ibp_deepspeed.models.tuning import Lora, Tuning, parse_freeze

    frozen = () if args.freeze is None else parse_freeze(args.freeze, begin.hf_config.num_hidden_layers)
    if args.lora is None:
        return Tuning(frozen=frozen)
    if begin.folder is None:
        raise ModelError("--lora trains adapters of a model's weights: say which with --init-from.")
    return Tuning(frozen=frozen, lora=Lora.parse(args.lora), base=weights_digest(begin.folder))


def _check_lengths(args: argparse.Namespace, hf_config: PretrainedConfig) -> None:
    from ibp_deepspeed.models.errors import ModelError

    check_positions(args.sequence_length, hf_config)
    for option, value in given_hyperparameters(args).items():
        if value < (0 if option in ("--warmup-steps", "--learning-rate") else 1):
            raise ModelError(f"{option} is {value}: give a larger one.")
    if args.allow_changed and args.resume is None:
        raise ModelError("--allow-changed says what may differ from a checkpoint: it goes together with --resume.")
    if args.keep < 1:
        raise ModelError(f"--keep is {args.keep}: keep at least 1 checkpoint.")
    for name in ("save_interval", "eval_interval", "eval_micro_batches", "grace_seconds"):
        if (getattr(args, name) or 0) < 0:
            raise ModelError(f"--{name.replace('_', '-')} is {getattr(args, name):g}: give 0 or more.")


def _keeps_documents_apart(args: argparse.Namespace, splits: Sequence[TokenFile], model: CausalLM) -> bool:
    """Whether --document-masks is on, by itself if all texts can, and the model can."""
    from ibp_deepspeed.data.samples import keeps_documents_apart

    texts = [split for split in splits if split.marks is None]
    apart = all(keeps_documents_apart(split, args.document_masks) for split in texts or splits)
    if apart:
        model.check_document_masks()
    return apart


def _check_amount(
    args: argparse.Namespace,
    ds_config: dict[str, Any],
    replicas: int,
    train: TokenFile,
    held_out: TokenFile,
    document_masks: bool,
    mixture: Mixture | None,
) -> None:
    """That there is a batch to train on and something to evaluate."""
    from ibp_deepspeed.data import HeldOut
    from ibp_deepspeed.data.samples import samples_of

    size, masks = ds_config["train_micro_batch_size_per_gpu"], document_masks
    files = held_out if mixture is None else mixture.held_out
    HeldOut(files, args.sequence_length, size, data_parallel_size=replicas, document_masks=masks)
    if mixture is not None:
        mixture.loader(args.sequence_length, size, document_masks=masks)
        return
    samples_of(train, args.sequence_length, masks).require(ds_config["train_batch_size"], "a batch")


def _check_heads(interlocking: InterlockingConfig, vocabulary: int) -> None:
    from ibp_deepspeed.errors import ConfigError

    negatives = interlocking.aux_head.negatives if interlocking.aux_head is not None else None
    if negatives is not None and negatives > vocabulary:
        raise ConfigError(f'"aux_head.negatives" is {negatives}, the vocabulary has {vocabulary} tokens: draw fewer.')


def _warn_of_unknown_keys(ds_config: dict[str, Any]) -> None:
    """Say which keys do nothing; in a library they are only logged."""
    from ibp_deepspeed.config.known_keys import unknown_keys

    unknown = unknown_keys(ds_config)
    if unknown:
        print(f"warning: nobody reads {', '.join(unknown)} of the configuration.", file=sys.stderr)


def _warn_of_schedule(ds_config: dict[str, Any], steps: int) -> None:
    """Say it when the learning rate would have reached its end long before the training does."""
    total = ds_config.get("scheduler", {}).get("params", {}).get("total_num_steps")
    if isinstance(total, int) and total < steps:
        print(
            f"warning: the configuration's learning rate ends at batch {total}, --steps is {steps}: set "
            f'"scheduler.params.total_num_steps" to "auto".',
            file=sys.stderr,
        )


def _warn_of_mode(interlocking: InterlockingConfig, num_stages: int) -> None:
    """Say it when language models are known to learn slowly with these options."""
    options, width = interlocking.aux_head, interlocking.width_for(num_stages)
    linear = options is not None and options.blocks == options.borrow == 0
    if interlocking.mode == "furthest" and 1 < width < len(interlocking.exits_for(num_stages)) and linear:
        print(
            f'warning: mode "furthest" at width {width} with linear heads learns language slowly (docs/learning.md): '
            'set "mode": "window", or "aux_head": {"blocks": 1}.',
            file=sys.stderr,
        )
