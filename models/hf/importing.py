"""A Hugging Face model as a folder of pipeline layers, written layer by layer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from ibp_deepspeed.checkpoint.store import write_texts, written
from models.build import Description
from models.causal_lm import CausalLM
from models.config import load_config
from models.errors import ModelError
from models.hf.weights import PretrainedWeights, local_folder
from models.runs.checkpoint import GENERATION_FILE, TOKENIZER_FOLDER, layer_file
from models.whole_folder import whole_folder


def import_model(path_or_name: str, out: Path) -> Path:
    """Write the weights in the dtype of the model's config, tokenizer and generation config; returns ``out``.

    One layer is in memory at a time.

    Raises:
        ModelError: a model that can't be cut or read, or a folder that exists or can't be written. Nothing is left.
    """
    folder = local_folder(path_or_name)
    config = load_config(folder)
    weights = PretrainedWeights(folder, config)
    weights.check()
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    model = CausalLM(config, dtype=dtype, weights=weights)
    length = getattr(config, "max_position_embeddings", None) or 2048
    description = Description(
        model=model.config.to_dict(),
        bounds=[0, model.num_layers],
        interlocking={"strategy": "global"},
        sequence_length=min(length, 2048),
        init_from=path_or_name,
    )
    with whole_folder(out) as made, written(out):
        for index in tqdm(range(model.num_layers), desc="layers", disable=None):
            torch.save(model.build_layer(index).state_dict(), made / layer_file(index))
        write_texts(made, description.files())
        _save_companions(folder, made)
    return out


def _save_companions(folder: Path, out: Path) -> None:
    """What goes along with the weights: the tokenizer, if there is one, and how to generate."""
    if (folder / GENERATION_FILE).exists():
        shutil.copy(folder / GENERATION_FILE, out)
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        try:
            AutoTokenizer.from_pretrained(str(folder)).save_pretrained(str(out / TOKENIZER_FOLDER))
        except Exception as error:  # each kind of tokenizer has its own
            raise ModelError(f"the tokenizer in {folder} can't be read: {str(error).splitlines()[0]}") from error
