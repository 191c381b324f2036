"""What a training consists of, checked as far as one process can before the processes meet."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from ibp_deepspeed.commands.planning.subject import check_positions
from ibp_deepspeed.commands.training.alike import digest
from ibp_deepspeed.commands.training.arguments import (
    default_hyperparameters,
    given_hyperparameters,
    parse_overrides,
)
from ibp_deepspeed.commands.training.job import (
    check_numbers,
    checked,
    processes,
    warn_of_schedule,
    warn_of_unknown_keys,
)
from ibp_deepspeed.commands.training.monitors import monitors_under, reporting_to
from ibp_deepspeed.commands.training.output import check_output
from ibp_deepspeed.commands.training.partition import stage_bounds
from ibp_deepspeed.commands.training.report import flops_per_token
from ibp_deepspeed.commands.training.sources import text_lines
from ibp_deepspeed.commands.training.training_plan import TrainingPlan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from ibp_deepspeed.commands.training.mixture import Mixture
    from ibp_deepspeed.commands.training.training_plan import Data
    from ibp_deepspeed.config.interlocking import InterlockingConfig
    from ibp_deepspeed.data import TokenFile
    from ibp_deepspeed.models import CausalLM
    from ibp_deepspeed.models.exits.evaluation import Evaluation
    from ibp_deepspeed.models.runs.conditions import Changes, Conditions
    from ibp_deepspeed.models.runs.description import Description
    from ibp_deepspeed.models.runs.start import StartingPoint
    from ibp_deepspeed.models.tuning import Tuning
    from ibp_deepspeed.pipeline import Pipeline
    from ibp_deepspeed.schedule.simulator import Costs


@dataclass
class Plan(TrainingPlan):
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

    counted = "tokens"

    def per_sample(self, args: argparse.Namespace) -> int:
        """Tokens."""
        length: int = args.sequence_length
        return length

    def flops(self, args: argparse.Namespace) -> float:
        """Of a token."""
        return flops_per_token(self, args.sequence_length)

    def costs(self, args: argparse.Namespace) -> list[Costs]:
        """Of each stage; decoder layers of the mean stage take 1 forward."""
        from ibp_deepspeed.models.workload import units

        return units(self.model, self.interlocking.aux_head, self.bounds, args.sequence_length)

    def head_parameters(self) -> list[int]:
        """All heads are alike."""
        heads, options = len(self.interlocking.exits_for(self.num_stages)) - 1, self.interlocking.aux_head
        return [] if options is None else [self.model.aux_head_parameters(options)] * heads

    @property
    def frozen_stages(self) -> tuple[int, ...]:
        """Those with nothing to train but a head."""
        return self.model.tuning.frozen_stages(self.bounds)

    def label_entropy(self) -> float:
        """Of the tokens' frequencies in the training data."""
        from ibp_deepspeed.data.joined import joined_entropy

        return joined_entropy([self.train] if self.mixture is None else self.mixture.train)

    def data_digest(self, args: argparse.Namespace) -> str:
        """Of the manifests, which have checksums of the files, and of the weights of a mixture."""
        from ibp_deepspeed.data.token_file import MANIFEST

        weights = str([source.weight for source in args.mixture]).encode()
        return digest(*((source.folder / MANIFEST).read_bytes() for source in args.mixture), weights)

    def data_lines(self, args: argparse.Namespace) -> list[str]:
        """The vocabulary, the sources, and whether documents are kept apart."""
        return text_lines(self, args)

    def open_data(self, pipeline: Pipeline, args: argparse.Namespace) -> Data:
        """Tokens."""
        from ibp_deepspeed.commands.training.start import open_data

        return open_data(pipeline, self, args)

    def remarks(self, pipeline: Pipeline, args: argparse.Namespace, data: Data) -> list[str]:
        """Where weights are from, what heads share, what of the data is left out."""
        from ibp_deepspeed.commands.training.start import remarks

        return remarks(pipeline, self, args, data)

    def evaluate(self, pipeline: Pipeline, held_out: Any) -> Evaluation:
        """Losses of all exits."""
        from ibp_deepspeed.models.exits.evaluation import evaluate

        return evaluate(pipeline, held_out)

    def table(self, evaluation: Any) -> str:
        """Loss and perplexity of each exit."""
        from ibp_deepspeed.models.exits.text import text_table

        return text_table(evaluation, self.label_entropy())

    def token_counts(self) -> Tensor | None:
        """For negatives that are drawn by frequency."""
        import torch

        options = self.interlocking.aux_head
        if options is None or options.negatives is None or options.negatives_by != "frequency":
            return None
        known = self.train if self.mixture is None else self.mixture
        return torch.from_numpy(known.counts(self.model.vocab_size))


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
    from ibp_deepspeed.models.runs.checkpoint import tokenizer_texts
    from ibp_deepspeed.models.runs.conditions import Conditions
    from ibp_deepspeed.models.runs.resume import checkpoint_to_resume
    from ibp_deepspeed.models.tuning import check_something_is_trained
    from ibp_deepspeed.strategy.timeline import Timeline

    check_output(args)
    num_stages, replicas = processes(args, "train_lm.py")
    first = os.environ["RANK"] == "0"
    ds_config = reporting_to(load_ds_config(args.deepspeed_config), args.report_to)
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
    ds_config = checked(fill_auto(ds_config, given_hyperparameters(args), defaults, replicas), replicas)
    micro_batches = ds_config["gradient_accumulation_steps"]
    heads = interlocking.exits_for(num_stages)[:-1] if interlocking.aux_head is not None else ()
    check_something_is_trained(tuning, model.num_layers, heads)
    model.side_loss(interlocking)  # refuses what it does not go with
    Timeline(interlocking, num_stages, micro_batches, interlocking.aux_head is not None).channel_depth()
    if first:
        _check_amount(args, ds_config, replicas, train, held_out, document_masks, mixture)
        warn_of_unknown_keys(ds_config)
        warn_of_schedule(ds_config, args.steps)
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
    check_positions(args.sequence_length, hf_config)
    check_numbers(args)


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


def _warn_of_mode(interlocking: InterlockingConfig, num_stages: int) -> None:
    """Say it when language models are known to learn slowly with these options."""
    options, width = interlocking.aux_head, interlocking.width_for(num_stages)
    linear = options is not None and options.blocks == options.borrow == 0 and options.objective.name != "momentum"
    if interlocking.mode == "furthest" and 1 < width < len(interlocking.exits_for(num_stages)) and linear:
        print(
            f'warning: mode "furthest" at width {width} with linear heads learns language slowly (docs/learning.md): '
            'set "mode": "window", or "aux_head": {"blocks": 1}.',
            file=sys.stderr,
        )
