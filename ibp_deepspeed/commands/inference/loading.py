"""The models that generate.py decodes with: from a checkpoint, an exported folder or an exported family."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibp_deepspeed.commands.inference.offloading import check_draft, check_held, is_offloaded, options
from ibp_deepspeed.errors import InterlockingError, first_line


@dataclass(frozen=True, eq=False)
class Loaded:
    """What there is to decode with.

    Attributes:
        model: in eval mode.
        draft: another one, or None.
        shared: decoder layers that the draft, an exit of the model, has in common with it; None: it is another model.
        tokenizer: of both.
    """

    model: Any
    draft: Any
    shared: int | None
    tokenizer: Any


def load(args: argparse.Namespace) -> Loaded:
    """What the command line asks for, on its device.

    Raises:
        InterlockingError: no model there, no such exit, or no tokenizer.
    """
    from ibp_deepspeed.models.hf.family import Family
    from ibp_deepspeed.models.tokenizer import load_tokenizer

    if args.checkpoint is not None:
        model, draft, shared, tokenizer = _from_checkpoint(args)
    elif Family.is_one(Path(args.model)):
        model, draft, shared, tokenizer = _from_family(Family(Path(args.model)), args)
    else:
        for name, value in (("--exit", args.exit), ("--draft-exit", args.draft_exit)):
            if value is not None:
                raise InterlockingError(
                    f"{name} {value} asks for an exit, and {args.model} is one model: give the folder that "
                    "convert_hf.py export --all-exits wrote, or a --checkpoint."
                )
        model, shared, tokenizer = _fitting(args.model, args), None, args.model
        draft = None if args.draft_model is None else from_folder(args.draft_model)
    model.eval()
    if not is_offloaded(model):
        model.to(args.device)
    if draft is not None:
        check_draft(model)
        draft.eval().to(args.device)
    return Loaded(model, draft, shared, load_tokenizer(tokenizer))


def _from_checkpoint(args: argparse.Namespace) -> tuple[Any, Any, int | None, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from ibp_deepspeed.models.exits.exits import Exits

    exits = Exits(args.checkpoint, args.device, memory_gib=args.memory_gib)
    last, tokenizer = args.exit or len(exits), exits.checkpoint.tokenizer
    if tokenizer is None:
        raise InterlockingError(f"{exits.folder} has no tokenizer, nor has the data it was trained on.")
    exits.check(last)
    check_held(exits)
    draft = shared = None
    if args.draft_exit is not None:
        exits.check(args.draft_exit)
        _check_smaller(args.draft_exit, last)
        draft, shared = exits.to_hugging_face(args.draft_exit), exits.shared_layers(args.draft_exit)
    return exits.to_hugging_face(last), draft, shared, tokenizer


def _from_family(family: Any, args: argparse.Namespace) -> tuple[Any, Any, int | None, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    last = args.exit or family.last
    draft = shared = None
    if args.draft_exit is not None:
        shared = family.shared_layers(args.draft_exit)
        _check_smaller(args.draft_exit, last)
        draft = family.load(args.draft_exit)
    elif args.draft_model is not None:
        draft = from_folder(args.draft_model)
    return _fitting(str(family.path(last)), args), draft, shared, family.path(last)


def _check_smaller(draft: int, last: int) -> None:
    if draft >= last:
        raise InterlockingError(f"--draft-exit {draft} drafts for exit {last}: give a smaller one.")


def _fitting(folder: str, args: argparse.Namespace) -> Any:
    return from_folder(folder, **options(Path(folder), args.device, args.memory_gib))


def from_folder(folder: str, **more: Any) -> Any:
    """The model in a Hugging Face folder, or of a name on the hub; ``more``: for ``from_pretrained``.

    Raises:
        InterlockingError: there is none, or it is damaged.
    """
    if Path(folder).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM

    from ibp_deepspeed.models.config import load_config

    if Path(folder).exists() and not (Path(folder) / "config.json").exists():
        raise InterlockingError(f"{folder} is no exported model: run scripts/convert_hf.py export first.")
    try:
        return AutoModelForCausalLM.from_pretrained(folder, config=load_config(folder), trust_remote_code=False, **more)
    except InterlockingError:
        raise
    except Exception as error:  # damaged files raise many kinds
        raise InterlockingError(f"no model in {folder}: {first_line(error)}") from error
