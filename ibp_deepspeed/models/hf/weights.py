"""Weights of a Hugging Face folder, read by pipeline layer: each process reads those of its own stages alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

# How Hugging Face's own loading turns names and tensors of files into those of models: no public interface, so the
# version of transformers is pinned and tests/models/test_weights.py takes every proven model there and back.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from ibp_deepspeed.checkpoint.tensor_file import read
from ibp_deepspeed.errors import InterlockingError, first_line
from ibp_deepspeed.folders import relative_name
from ibp_deepspeed.json_text import parsed, small_text
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.hf.assemble import model_key
from ibp_deepspeed.models.shell import Shell, meta_model, untied

_FORMATS = ("model.safetensors", "pytorch_model.bin")
_NOT_WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja"]


def local_folder(path_or_name: str | Path) -> Path:
    """A folder with a model: itself, or a download of that name from the hub.

    Raises:
        ModelError: there is neither.
    """
    if Path(path_or_name).is_dir():
        return Path(path_or_name)
    from huggingface_hub import snapshot_download

    name = str(path_or_name)
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_NOT_WEIGHTS, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):  # an old repository
            folder = Path(snapshot_download(name, allow_patterns=[*_NOT_WEIGHTS, "pytorch_model*.bin"]))
    except Exception as error:  # no such name, no network, no permission: each has an exception of its own
        raise ModelError(f"'{name}' is no folder, and can't be had from the hub: {first_line(error)}") from error
    return folder


class PretrainedWeights:
    """The weights in a Hugging Face folder as those of pipeline layers, in fp32.

    Only names are read at first; :meth:`layer` reads that layer's tensors. Names and layouts that differ between
    file and model (experts stored one by one, a missing prefix) are converted by Hugging Face's own rules.

    Args:
        folder: with safetensors or ``pytorch_model.bin`` files, and an index if there are several.
        hf_config: of the model.

    Raises:
        ModelError: no weights, a damaged file, or weights of another model; named.
    """

    def __init__(self, folder: str | Path, hf_config: PretrainedConfig) -> None:
        self.folder = Path(folder)
        self._shell = Shell(hf_config)
        self._model = meta_model(untied(hf_config))
        self._files = _files_of_keys(self.folder)
        self._rules = get_model_conversion_mapping(self._model)
        self._sources = self._sources_of_targets()
        self._readout_key = f"{self._shell.readout_name}.weight"
        inputs = self._model.get_input_embeddings()
        self._embedding_key = next(f"{name}.weight" for name, m in self._model.named_modules() if m is inputs)

    def layer(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Those of ``names`` in the state dict of layer ``index`` of a ``CausalLM``, in fp32.

        Raises:
            ModelError: one is missing, or of another shape, or can't be read.
        """
        keys = {name: self._stored_key(model_key(self._shell, index, name)) for name in names}
        missing = sorted(key for key in keys.values() if key not in self._sources)
        if missing:
            raise ModelError(f"{self.folder} has no weight {missing[0]}: it is not a model of this config.")
        values = self._read(set(keys.values()))
        return {name: values[key] for name, key in keys.items()}

    def check(self) -> None:
        """Find out without reading whether every weight of the model is there and, if it is stored as it is, fits.

        Raises:
            ModelError: one is missing or of another shape.
        """
        with _opened(self.folder, set(self._files.values())) as files:
            for key, ours in self._model.state_dict().items():
                stored = self._sources.get(self._stored_key(key))
                if not stored:
                    raise ModelError(f"{self.folder} has no weight {key}: it is not a model of this config.")
                if stored == [self._stored_key(key)]:
                    self._check_shape(key, files[self._files[stored[0]]][stored[0]], ours)

    def _check_shape(self, key: str, stored: Any, ours: Tensor) -> None:
        there = tuple(stored.shape if isinstance(stored, Tensor) else stored.get_shape())
        if there != tuple(ours.shape):
            raise ModelError(
                f"{self.folder} has a weight {key} of {there}, the model's is {tuple(ours.shape)}: the sizes in the "
                "model's config must be those of the weights."
            )

    def _stored_key(self, key: str) -> str:
        """A tied LM head is the embedding, whatever else a file may have in its place."""
        return self._embedding_key if self._shell.was_tied and key == self._readout_key else key

    def _sources_of_targets(self) -> dict[str, list[str]]:
        """Key in the model → keys in the files that it is made of."""
        renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        known, prefix = self._model.state_dict(), self._model.base_model_prefix
        sources: dict[str, list[str]] = {}
        for key in self._files:
            target, pattern = rename_source_key(key, renamings, converters, prefix, known)
            targets = [target]
            if pattern is not None:  # one tensor of a file may be several of the model
                first, *others = by_pattern[pattern].target_patterns
                targets += [target.replace(first, other) for other in others]
            if target not in known and key in known:
                targets = [key]
            for name in targets:
                sources.setdefault(name, []).append(key)
        return sources

    def _read(self, targets: set[str]) -> dict[str, Tensor]:
        """Tensors of the model by key: have Hugging Face load them into a model on meta, and take them out again."""
        stored = sorted({key for target in targets for key in self._sources[target]})
        settings = LoadStateDictConfig(weight_mapping=self._rules, dtype=torch.float32)
        with _opened(self.folder, {self._files[key] for key in stored}) as files, _without_progress_bar():
            state = {key: files[self._files[key]][key] for key in stored}
            try:
                info, _ = convert_and_load_state_dict_in_model(self._model, state, settings)
            except (OSError, RuntimeError, SafetensorError, ValueError) as error:
                raise ModelError(f"weights in {self.folder} can't be read: {first_line(error)}") from error
            for key, there, ours in sorted(info.mismatched_keys):
                self._check_shape(key, torch.empty(there, device="meta"), torch.empty(ours, device="meta"))
            if info.conversion_errors or info.error_msgs:
                reason = next(iter([*info.conversion_errors.values(), *info.error_msgs]))
                raise ModelError(f"weights in {self.folder} can't be converted: {first_line(reason)}")
            # copied: a tensor may be a view of its file, which a training could be about to replace
            loaded = self._model.state_dict()
            values = {key: loaded[key].detach().to(torch.float32, copy=True) for key in targets}
        for key in [key for key, tensor in loaded.items() if not tensor.is_meta and key in self._parameters()]:
            set_module_tensor_to_device(self._model, key, "meta")
        return values

    def _parameters(self) -> set[str]:
        return {name for name, _ in self._model.named_parameters()}


def _files_of_keys(folder: Path) -> dict[str, str]:
    """Key → name of the file that holds it."""
    for single in _FORMATS:
        index = f"{single}.index.json"
        if (folder / single).exists():
            with _opened(folder, {single}) as files:
                return dict.fromkeys(files[single], single)
        if (folder / index).exists():
            try:
                mapping: dict[str, str] = dict(parsed(small_text(folder / index))["weight_map"])
                for name in mapping.values():
                    relative_name(name)  # a link is the user's own: the hub's downloads are links to its cache
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{folder / index} is damaged: {first_line(error)}") from error
            lost = sorted(name for name in set(mapping.values()) if not (folder / name).exists())
            if lost:
                raise ModelError(f"{folder} lacks {lost[0]}, which {index} names: copy or download it again.")
            return mapping
    raise ModelError(
        f"{folder} has no weights ({' or '.join(_FORMATS)}, or their index): give a folder that save_pretrained wrote."
    )


@contextlib.contextmanager
def _opened(folder: Path, names: set[str]) -> Iterator[dict[str, Mapping[str, Any]]]:
    """File name → its tensors by key, each read when it is used."""
    with contextlib.ExitStack() as stack:
        files: dict[str, Mapping[str, Any]] = {}
        for name in names:
            try:
                if name.endswith(".safetensors"):
                    file = stack.enter_context(safe_open(folder / name, framework="pt"))
                    files[name] = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                else:
                    files[name] = read(folder / name)
            except InterlockingError:
                raise
            except Exception as error:  # damaged files raise many kinds
                raise ModelError(f"{folder / name} can't be read: {first_line(error)}") from error
        yield files


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
