"""A Hugging Face model as a folder of pipeline layers, written layer by layer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from ibp_deepspeed.atomic_files import new_folder
from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.checkpoint.store import write_errors, write_texts
from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.models.config import load_config
from ibp_deepspeed.models.hf.weights import PretrainedWeights, local_folder
from ibp_deepspeed.models.runs.description import Description
from ibp_deepspeed.models.tokenizer import load_tokenizer


def import_model(path_or_name: str, out: Path) -> Path:
    """Write the weights in the dtype of the model's config, tokenizer and generation config; returns ``out``.

    One layer is in memory at a time.

    Raises:
        ModelError: a model that can't be cut or read. Nothing is left.
        OutputError: a folder that exists or can't be written.
    """
    folder = local_folder(path_or_name)
    hf_config = load_config(folder)
    weights = PretrainedWeights(folder, hf_config)
    weights.check()
    dtype = hf_config.dtype if isinstance(hf_config.dtype, torch.dtype) else torch.float32
    model = CausalLM(hf_config, dtype=dtype, weights=weights)
    length = getattr(hf_config, "max_position_embeddings", None) or 2048
    description = Description(
        model=model.hf_config.to_dict(),
        bounds=[0, model.num_layers],
        interlocking={"strategy": "global"},
        sequence_length=min(length, 2048),
        init_from=path_or_name,
    )
    with new_folder(out) as made, write_errors(out):
        for index in tqdm(range(model.num_layers), desc="layers", disable=None):
            torch.save(model.build_layer(index).state_dict(), made / layout.layer(index))
        write_texts(made, description.files())
        _save_companions(folder, made)
    return out


def _save_companions(folder: Path, out: Path) -> None:
    """What goes along with the weights: the tokenizer, if there is one, and how to generate."""
    if (folder / layout.GENERATION).exists():
        shutil.copy(folder / layout.GENERATION, out)
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        load_tokenizer(folder).save_pretrained(str(out / layout.TOKENIZER))
