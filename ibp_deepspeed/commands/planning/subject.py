"""The options of plan.py and profile_stage.py that say what is trained, and the model that they mean."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ibp_deepspeed.errors import PlanError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from ibp_deepspeed.config.interlocking import AuxHeadConfig
    from ibp_deepspeed.models import CausalLM


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, micro-batch, dtype, head."""
    add = parser.add_argument_group("what is trained").add_argument
    add(
        "--model",
        required=True,
        metavar="CONFIG",
        help="config: JSON file, folder, hub name or ours (llama-tiny)",
    )
    add(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="override values of the model's config (default: none)",
    )
    add("--sequence-length", type=int, default=2048, metavar="S", help="tokens of a sample (default: %(default)s)")
    add("--micro-batch-size", type=int, default=1, metavar="B", help="samples of a micro-batch (default: %(default)s)")
    add("--fp32", action="store_true", help="compute in fp32 (default: bf16 with fp32 copies)")
    add(
        "--head",
        nargs="*",
        default=[],
        metavar="OPTION=VALUE",
        help="options of aux_head: readout, blocks, rank, aux_tokens, negatives, … (default: a private LM head)",
    )


def check_sizes(args: argparse.Namespace, *names: str) -> None:
    """That options of these names are at least 1.

    Raises:
        PlanError: one is less.
    """
    for name in names:
        if getattr(args, name) < 1:
            raise PlanError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give at least 1.")


def check_positions(sequence_length: int, hf_config: PretrainedConfig) -> None:
    """That a model has positions for a sequence.

    Raises:
        ModelError: it has fewer.
    """
    from ibp_deepspeed.models.errors import ModelError

    if sequence_length > getattr(hf_config, "max_position_embeddings", sequence_length):
        raise ModelError(
            f"--sequence-length {sequence_length} is longer than the model's {hf_config.max_position_embeddings} "
            f"positions: use --set max_position_embeddings={sequence_length}."
        )


def subject(args: argparse.Namespace, dtype: torch.dtype | None = None) -> tuple[CausalLM, AuxHeadConfig]:
    """The cut model and the options of its auxiliary heads.

    Args:
        args: of :func:`add_subject_arguments`.
        dtype: of the model's parameters; None: it is not going to be built.

    Raises:
        InterlockingError: one sentence about the first thing that is wrong.
    """
    from ibp_deepspeed.commands.training.arguments import parse_overrides
    from ibp_deepspeed.config.interlocking import InterlockingConfig
    from ibp_deepspeed.models import CausalLM
    from ibp_deepspeed.models.config import load_config

    options = InterlockingConfig.parse({"aux_head": parse_overrides(args.head, "--head")}).aux_head
    assert options is not None
    if options.borrow:
        raise PlanError(f"--head borrow={options.borrow}: heads behind a borrowed layer have a row of their own.")
    config = load_config(args.model, **parse_overrides(args.set))
    model = CausalLM(config) if dtype is None else CausalLM(config, dtype=dtype)
    check_negatives(options, model)
    return model, options


def check_negatives(options: AuxHeadConfig, model: CausalLM) -> None:
    """That a head draws no more tokens than there are.

    Raises:
        PlanError: it would.
    """
    if options.negatives is not None and options.negatives > model.vocab_size:
        raise PlanError(
            f"--head negatives={options.negatives}: the vocabulary has {model.vocab_size} tokens, give at most those."
        )
