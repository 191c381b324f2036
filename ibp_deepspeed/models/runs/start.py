"""What a training begins with: a config and random weights, or the weights of a Hugging Face model or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.models.config import load_config, overridden
from ibp_deepspeed.models.cut_model import Weights
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.runs.checkpoint import Checkpoint
from ibp_deepspeed.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from ibp_deepspeed.models.hf.weights import PretrainedWeights


@dataclass(frozen=True)
class StartingPoint:
    """A config, the weights (None: random ones) and their folder, and texts that go into every checkpoint, by name."""

    hf_config: PretrainedConfig
    weights: Weights | None
    files: Mapping[str, str]
    folder: Path | None = None


def random_start(model: str, overrides: Mapping[str, Any]) -> StartingPoint:
    """Random weights for a config, see :func:`ibp_deepspeed.models.config.load_config`."""
    return StartingPoint(load_config(model, **overrides), None, {})


def pretrained_start(path_or_name: str, overrides: Mapping[str, Any], data_tokenizer: Path | None) -> StartingPoint:
    """The weights of a folder: Hugging Face's, a checkpoint's or an import's; or of a name on the hub.

    Args:
        path_or_name: where they are.
        overrides: of config values that change no weight's size.
        data_tokenizer: folder of the tokenizer that made the training data; None leaves the comparison out.

    Raises:
        ModelError: no such model, weights that are missing or don't fit, or data of another tokenizer.
    """
    weights: PretrainedWeights | Checkpoint
    if Checkpoint.is_in(path_or_name):
        weights = Checkpoint(path_or_name)
        hf_config, folder = overridden(weights.description.hf_config(), overrides), weights.folder
        tokenizer = weights.tokenizer
    else:
        # here, because only this path needs interfaces of Hugging Face's that are not public
        from ibp_deepspeed.models.hf.weights import PretrainedWeights, local_folder

        folder = local_folder(path_or_name)
        hf_config = load_config(folder, **overrides)
        weights = PretrainedWeights(folder, hf_config)
        weights.check()
        tokenizer = folder if (folder / "tokenizer.json").exists() else None
    if tokenizer is not None and data_tokenizer is not None:
        check_same_tokenizer(tokenizer, data_tokenizer)
    generation = folder / layout.GENERATION
    files = {layout.GENERATION: generation.read_text(encoding="utf-8")} if generation.exists() else {}
    return StartingPoint(hf_config, weights, files, folder)


def check_same_tokenizer(of_model: Path, of_data: Path) -> None:
    """Raises a ModelError when the same token ids mean other tokens."""
    files = [folder / "tokenizer.json" for folder in (of_model, of_data)]
    if all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    theirs, ours = (load_tokenizer(folder).get_vocab() for folder in (of_model, of_data))
    other = [token for token, number in ours.items() if theirs.get(token) != number]
    if other:
        raise ModelError(
            f"the data in {of_data.parent} were made with another tokenizer than the model's in {of_model}: "
            f"{len(other):,} of {len(ours):,} tokens differ, {other[0]!r} is one; prepare them with --tokenizer "
            f"{of_model}."
        )
