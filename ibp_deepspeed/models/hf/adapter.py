"""A checkpoint's adapters as a folder for ``PeftModel.from_pretrained``: written, loaded and compared, then renamed."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ibp_deepspeed.atomic_files import new_folder
from ibp_deepspeed.checkpoint.finite import not_finite
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.exits.exits import Exits
from ibp_deepspeed.models.hf.assemble import model_key
from ibp_deepspeed.models.hf.weights import local_folder
from ibp_deepspeed.models.runs.checkpoint import Checkpoint
from ibp_deepspeed.models.shell import Shell
from ibp_deepspeed.models.tuning import Tuning

_WEIGHTS = "adapter_model.safetensors"  # peft's names
_PREFIX = "base_model.model."
_TOLERANCE = {torch.float32: 1e-5}  # of the largest logit: the exit has the adapters multiplied out
_COARSE_TOLERANCE = 2e-2  # the same in 16 bits


def write_adapter(exits: Exits, out: Path) -> int:
    """Write the adapters that a checkpoint holds as peft does; returns how many numbers they are.

    Args:
        exits: of the checkpoint.
        out: the folder, which must not exist.

    Raises:
        OutputError: the folder exists or can't be written.
        ModelError: the checkpoint has no adapters, or none of a Hugging Face folder; adapters that are not finite; or
            peft does not give the checkpoint's logits with what was written. Nothing is left.
    """
    tuning, base = exits.checkpoint.adapters, exits.description.init_from
    if tuning is None or tuning.lora is None or base is None:
        raise ModelError(f"{exits.folder} has no adapters: export the model without --adapter.")
    if Checkpoint.is_in(base):
        raise ModelError(
            f"the adapters in {exits.folder} belong to the checkpoint {base}, which peft can't read: export the whole "
            "model without --adapter, or export that checkpoint first and train on it."
        )
    shell = Shell(exits.hf_config)
    state = _state(exits, shell, tuning)
    found = not_finite(state.items())
    if found:
        raise ModelError(f"{exits.folder} has adapters that are not finite, {found[0]} is the first of {len(found)}.")
    layers = [index - 1 for index in range(1, exits.model.num_layers - 1) if index not in tuning.frozen]
    config = tuning.lora.peft_config(
        shell.layers[0],
        base_model_name_or_path=base,
        layers_to_transform=layers,
        layers_pattern=shell.layers_name,
        inference_mode=True,
    )
    with new_folder(out) as folder:
        save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        _check(exits, folder, local_folder(base))
    return sum(tensor.numel() for tensor in state.values())


def _state(exits: Exits, shell: Shell, tuning: Tuning) -> dict[str, Tensor]:
    """Every adapter tensor by peft's name for it in the whole model."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = {}
    for index in range(1, exits.model.num_layers - 1):
        layer = exits.model.empty_layer(index)
        tuning.adapt(layer, index)
        if index in tuning.frozen:
            continue
        layer.load_state_dict(exits.checkpoint.stored_state(index), strict=False)
        for name, tensor in get_peft_model_state_dict(layer.layer).items():
            found[_PREFIX + model_key(shell, index, f"layer.{name}")] = tensor.contiguous()
    return found


def _check(exits: Exits, folder: Path, base: Path) -> None:
    """Load what was written onto the base model, as a user will, and compare logits."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
        try:
            loaded = PeftModel.from_pretrained(model, str(folder)).eval()
        except UserWarning as problem:
            raise ModelError(f"the adapters do not load as they were saved: {problem}") from problem
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wide = exits.in_full_precision()
        want, got = wide.lazy_logits(ids, len(exits)).materialize().cpu(), loaded(ids).logits
    difference = ((got - want).abs().max() / want.abs().max().clamp(min=1e-6)).item()
    if not difference <= _TOLERANCE.get(exits.checkpoint.dtype, _COARSE_TOLERANCE):
        raise ModelError(f"peft's logits with the adapters differ by {difference:.1e} of the largest.")
