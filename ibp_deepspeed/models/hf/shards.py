"""A model written as safetensors layer by layer, where it is larger than memory: what ``save_pretrained`` writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate.utils import convert_file_size_to_int
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion  # no public interface, see weights.py
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ibp_deepspeed.checkpoint.finite import not_finite
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.hf.assemble import as_exported, model_key
from ibp_deepspeed.models.shell import Shell, meta_model, untied


def empty_model(hf_config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config on meta, with an LM head of its own; its ``save_pretrained`` writes the configs."""
    return as_exported(meta_model(untied(hf_config)).to(dtype))


def write_shards(
    model: PreTrainedModel, states: Iterable[Mapping[str, Tensor]], folder: Path, shard_bytes: int, source: Path
) -> None:
    """Write weights into a folder, behind the configs; one layer is in memory at a time, and one file's tensors.

    Args:
        model: on meta.
        states: state dicts of its pipeline layers, from the first.
        folder: that there is.
        shard_bytes: of the largest file, unless a tensor is larger.
        source: where the states are from, for messages.

    Raises:
        ModelError: a weight that is missing, unknown, of another shape, or not finite; named.
    """
    shell, wanted = Shell(model.config), {name: tensor.shape for name, tensor in model.state_dict().items()}
    left, ignored = set(wanted), set(model._keys_to_ignore_on_save or ())
    shards = _Shards(folder, shard_bytes)
    for index, state in enumerate(states):
        weights = {model_key(shell, index, name): tensor.detach() for name, tensor in state.items()}
        misfits = sorted(name for name, tensor in weights.items() if wanted.get(name) != tensor.shape)
        if misfits:
            raise ModelError(f"weights do not fit {shell}: {misfits[0]} is unknown, or of another shape.")
        found = not_finite(weights.items())
        if found:
            raise ModelError(
                f"{source} has weights that are not finite, {found[0]} is the first: export an earlier checkpoint, or "
                "train again with a smaller learning rate."
            )
        left -= weights.keys()
        # what Hugging Face's files hold in another layout (experts one by one) is of one layer
        kept = {name: tensor for name, tensor in weights.items() if name not in ignored}
        shards.add(revert_weight_conversion(model, kept))
    if left:
        raise ModelError(f"weights do not fit {shell}: {min(left)} is missing.")
    shards.close(model.num_parameters())


def limit(shard_size: str, memory_bytes: int) -> int:
    """Bytes of a file: what was asked for, but no more than a quarter of the memory, where it is put together."""
    return min(convert_file_size_to_int(shard_size), memory_bytes // 4)


class _Shards:
    """Files that are filled one after the other."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._open: dict[str, Tensor] = {}
        self._names: list[list[str]] = []
        self._total = 0

    def add(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in weights.items():
            if self._open and sum(t.nbytes for t in self._open.values()) + tensor.nbytes > self._shard_bytes:
                self._write()
            self._open[name] = tensor.contiguous()

    def close(self, parameters: int) -> None:
        """Write what is left, give the files their names, and write an index if there are several."""
        self._write()
        count = len(self._names)
        if count == 1:
            self._part(0).rename(self._folder / SAFE_WEIGHTS_NAME)
            return
        weight_map = {}
        for number, names in enumerate(self._names):
            file = SAFE_WEIGHTS_NAME.replace(".", f"-{number + 1:05d}-of-{count:05d}.")
            self._part(number).rename(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        metadata = {"total_parameters": parameters, "total_size": self._total}
        index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        (self._folder / SAFE_WEIGHTS_INDEX_NAME).write_text(index + "\n", encoding="utf-8")

    def _write(self) -> None:
        if self._open:
            save_file(self._open, self._part(len(self._names)), metadata={"format": "pt"})
            self._names.append(list(self._open))
            self._total += sum(tensor.nbytes for tensor in self._open.values())
            self._open = {}

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}"
