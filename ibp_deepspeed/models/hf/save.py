"""A model as a folder for ``from_pretrained``: written beside its place, loaded and compared, then renamed.

One that in fp32 takes more than half of the memory is written and compared layer by layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from ibp_deepspeed.atomic_files import new_folder
from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.checkpoint.finite import not_finite
from ibp_deepspeed.models.causal_lm import CausalLM
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.exits.exits import Exits
from ibp_deepspeed.models.hf.model_card import model_card
from ibp_deepspeed.models.hf.shards import empty_model, limit, write_shards
from ibp_deepspeed.models.hf.weights import PretrainedWeights
from ibp_deepspeed.models.tokenizer import load_tokenizer

_TOLERANCE = {torch.float32: 1e-5}  # of the largest logit; a head's temperature is folded into its LM head
_COARSE_TOLERANCE = 2e-2  # the same in 16 bits
_CHECKED_TOKENS = 64


def write(
    exits: Exits,
    out: Path,
    exit_: int | None = None,
    *,
    shard_size: str = "5GB",
    results: Mapping[str, Any] | None = None,
) -> int:
    """Write an exit as a Hugging Face folder with tokenizer, generation config and model card.

    Args:
        exits: of a checkpoint.
        out: the folder, which must not exist.
        exit_: 1 … K; None for K, the whole model.
        shard_size: of the largest safetensors file, as in ``save_pretrained``.
        results: what the card lists beside the training.

    Returns:
        the model's parameters.

    Raises:
        OutputError: the folder exists or can't be written.
        ModelError: weights are not finite; or what was written does not load with every key, or not with the exit's
            logits, because its head has something that the architecture has no place for. Nothing is left.
    """
    exit_ = len(exits) if exit_ is None else exit_
    exits.check(exit_)
    wide = exits.in_full_precision()
    with new_folder(out, (SafetensorError,)) as folder:
        if wide.is_streamed:
            hf_config, states = exits.as_model(exit_)
            model = empty_model(hf_config, exits.checkpoint.stored_dtype)
            _save(exits, model, folder, shard_size, {})
            write_shards(model, states, folder, limit(shard_size, wide.memory.bytes), exits.folder)
        else:
            model = exits.to_hugging_face(exit_)
            _check_finite(exits, model)
            _save(exits, model, folder, shard_size)
        card = model_card(exits, exit_, model.num_parameters(), results or {})
        card.save(folder / "README.md")
        _check(wide, exit_, folder, next(model.parameters()).dtype)
    return model.num_parameters()


def _check_finite(exits: Exits, model: PreTrainedModel) -> None:
    found = not_finite(model.named_parameters())
    if found:
        raise ModelError(
            f"{exits.folder} has weights that are not finite, {found[0]} is the first of {len(found)}: its training "
            "went wrong before it was saved; export an earlier checkpoint, or train again with a smaller learning rate."
        )


def _save(
    exits: Exits, model: PreTrainedModel, folder: Path, shard_size: str, weights: dict[str, Tensor] | None = None
) -> None:
    """``weights``: those to write beside the configs; None: the model's."""
    source = exits.folder / layout.GENERATION
    if source.exists():
        model.generation_config = GenerationConfig.from_pretrained(exits.folder)
    if exits.checkpoint.tokenizer is not None:
        tokenizer = load_tokenizer(exits.checkpoint.tokenizer)
        if not source.exists() and model.generation_config is not None:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(model.generation_config, name, getattr(tokenizer, name))
                setattr(model.config, name, getattr(tokenizer, name))
    model.save_pretrained(folder, max_shard_size=shard_size, state_dict=weights)
    if exits.checkpoint.tokenizer is not None:
        shutil.copytree(exits.checkpoint.tokenizer, folder, dirs_exist_ok=True)


def _check(exits: Exits, exit_: int, folder: Path, dtype: torch.dtype) -> None:
    """Load what was written, as a user will or layer by layer, and compare keys and logits."""
    hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    length = min(_CHECKED_TOKENS, getattr(hf_config, "max_position_embeddings", None) or _CHECKED_TOKENS)
    ids = torch.randint(hf_config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = _layer_by_layer(folder, hf_config, ids) if exits.is_streamed else _loaded(folder, ids)
        want = exits.lazy_logits(ids, exit_).materialize().cpu()
    difference = ((got - want).abs().max() / want.abs().max().clamp(min=1e-6)).item()
    if not difference <= _TOLERANCE.get(dtype, _COARSE_TOLERANCE):
        raise ModelError(
            f"exit {exit_} can't be written as a {hf_config.model_type} model: the architecture has no place for "
            f"its head, logits differ by {difference:.1e} of the largest."
        )


def _loaded(folder: Path, ids: Tensor) -> Tensor:
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if problems:
        raise ModelError(f"the export does not load as it was saved: {problems}.")
    logits: Tensor = loaded.eval()(ids, use_cache=False).logits
    return logits


def _layer_by_layer(folder: Path, hf_config: PretrainedConfig, ids: Tensor) -> Tensor:
    """By Hugging Face's own rules too, but with one layer in memory."""
    weights = PretrainedWeights(folder, hf_config)
    weights.check()
    model, hidden = CausalLM(hf_config, weights=weights), ids
    for index in range(model.num_layers):
        hidden = model.build_layer(index).eval()(hidden)
    logits: Tensor = hidden.materialize()  # type: ignore[attr-defined]
    return logits
