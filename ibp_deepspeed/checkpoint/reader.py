"""Weights and optimizer states of a checkpoint by name, whatever the pipeline that wrote it.

A name says where a parameter stands in the uncut model: "3.weight" is that of layer 3, "head 4.weight" that of the head
before layer 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.checkpoint.manifest import PipelineShape
from ibp_deepspeed.checkpoint.tensor_file import read
from ibp_deepspeed.errors import CheckpointError

NAMES_KEY = "parameter_names"
"""In the file of a stage: its trained parameters' names, in the order of the optimizer."""
MASTER = "master"
"""The key of fp32 copies of weights in a parameter's state."""
_HEAD = "head "
_MODULES_HEAD = "aux_head."


def head_name(boundary: int, name: str) -> str:
    """The name of a parameter of the head before layer ``boundary``."""
    return f"{_HEAD}{boundary}.{name}"


def names_of(module: nn.Module, boundary: int | None) -> dict[str, str]:
    """Of a stage's module: name in it → name in the model; ``boundary`` is its head's."""
    return {name: _in_the_model(name, boundary) for name, _ in module.named_parameters()}


class CheckpointReader:
    """Reads the files of the stages that wrote a checkpoint when they are needed.

    Args:
        folder: of the checkpoint.
        shape: of the pipeline that wrote it.
    """

    def __init__(self, folder: Path, shape: PipelineShape) -> None:
        self.folder, self.shape = folder, shape
        self._weights: dict[str, Mapping[str, Tensor]] = {}
        self._states: dict[int, dict[str, dict[str, Any]]] = {}
        self._settings: dict[int, dict[str, dict[str, Any]]] = {}
        self._files: dict[int, dict[str, Any]] = {}

    def weight(self, name: str) -> Tensor | None:
        """A weight or buffer, None if there is no such."""
        place, _, rest = name.partition(".")
        if place not in self._weights:
            path = self._file_of(place)
            self._weights[place] = read(path) if path is not None else {}
        return self._weights[place].get(rest)

    def state(self, name: str) -> dict[str, Any]:
        """What the optimizer knew of a parameter: tensors of its size, flat or not, and numbers, which may be tensors
        too; with mixed precision its fp32 copy as ``MASTER``. Empty for a parameter that was not trained."""
        stage = self._stage_that_trained(name)
        return {} if stage is None else self._states[stage][name]

    def settings(self, name: str) -> dict[str, Any]:
        """Rate and the like of the parameter group that a parameter was in. Empty for one that was not trained."""
        stage = self._stage_that_trained(name)
        return {} if stage is None else self._settings[stage].get(name, {})

    def stage_file(self, stage: int = 0) -> dict[str, Any]:
        """What a stage's main file holds: counters, the rate's schedule, perhaps the optimizer."""
        if stage not in self._files:
            self._files[stage] = read(self.folder / layout.stage(stage))
        return self._files[stage]

    def first_settings(self) -> list[dict[str, Any]]:
        """Rates and the like of the parameter groups of the first stage."""
        return [_without_parameters(group) for group in self._optimizer(0)[0].get("param_groups", [])]

    def _stage_that_trained(self, name: str) -> int | None:
        """Whose optimizer had a parameter, with that stage's states and settings read."""
        for stage in self._stages(name):
            if stage not in self._states:
                self._states[stage] = self._read_states(stage)
            if name in self._states[stage]:
                return stage
        return None

    def _file_of(self, place: str) -> Path | None:
        """The file of a layer ("3") or of a head ("head 4")."""
        if place.startswith(_HEAD):
            path = self.folder / layout.aux_head(int(place.removeprefix(_HEAD)))
            return path if path.exists() else None
        return layout.find_layer(self.folder, int(place)) if place.isdigit() else None

    def _stages(self, name: str) -> list[int]:
        """Where a parameter may be."""
        place = name.partition(".")[0]
        if place.startswith(_HEAD):
            stage = self.shape.heads.get(int(place.removeprefix(_HEAD)))
            return [] if stage is None else [stage]
        if not place.isdigit():
            return list(range(self.shape.stages))  # a tied layer's
        return [k for k in range(self.shape.stages) if self.shape.bounds[k] <= int(place) < self.shape.bounds[k + 1]]

    def _optimizer(self, stage: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """torch's optimizer state of a stage, and DeepSpeed's around it for each replica if that partitions it."""
        inside = self.stage_file(stage).get("optimizer")
        if inside is not None and "state" in inside:
            return inside, []
        paths = [self._partition_file(stage, replica) for replica in range(self.shape.replicas)]
        partitions = [read(path)["optimizer_state_dict"] for path in paths]
        return partitions[0]["base_optimizer_state"], partitions

    def _partition_file(self, stage: int, replica: int) -> Path:
        found = layout.find_optimizer(self.folder, replica, stage)
        if found is None:
            raise CheckpointError(f"{self.folder} has no optimizer state of replica {replica}, stage {stage}.")
        return found

    def _read_states(self, stage: int) -> dict[str, dict[str, Any]]:
        complete, partitions = self._optimizer(stage)
        groups = [_without_parameters(group) for group in complete.get("param_groups", [])]
        if partitions:
            return self._joined(stage, partitions, groups)
        file = self.stage_file(stage)
        if NAMES_KEY not in file:
            raise CheckpointError(
                f'{self.folder} does not name the parameters of its optimizer: load it with "decay": "all" and the '
                "stages, replicas and heads that it was written with."
            )
        names = dict(enumerate(file[NAMES_KEY]))
        found = {name: dict(complete["state"].get(index, {})) for index, name in names.items()}
        settings = self._settings[stage] = {}
        for group, kept in zip(complete["param_groups"], groups, strict=True):
            settings.update({names[index]: kept for index in group["params"]})  # counted on from group to group
        for name, master in zip(file[NAMES_KEY], file.get("masters") or [], strict=False):
            found[name][MASTER] = master
        return found

    def _joined(
        self, stage: int, partitions: list[dict[str, Any]], groups: list[dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """Each parameter's pieces from the replicas' flat tensors, in their order."""
        boundary = next((b for b, holder in self.shape.heads.items() if holder == stage), None)
        pieces: dict[str, dict[str, list[Tensor]]] = {}
        numbers: dict[str, dict[str, Any]] = {}
        settings = self._settings[stage] = {}
        for partition in partitions:
            base = partition["base_optimizer_state"]["state"]
            for group, fragments in enumerate(partition["param_slice_mappings"]):
                master = partition["single_partition_of_fp32_groups"][group]
                flat = {MASTER: master, **base.get(group, {})}
                for raw, fragment in fragments.items():
                    name = _in_the_model(raw, boundary)
                    settings[name] = groups[group]
                    for key, tensor in flat.items():
                        if isinstance(tensor, Tensor) and tensor.dim() > 0:
                            piece = tensor.narrow(0, fragment.start, fragment.numel)
                            pieces.setdefault(name, {}).setdefault(key, []).append(piece)
                        else:
                            numbers.setdefault(name, {})[key] = tensor
        return {
            name: {**{k: torch.cat(v) for k, v in keys.items()}, **numbers.get(name, {})}
            for name, keys in pieces.items()
        }


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _in_the_model(name: str, boundary: int | None) -> str:
    if name.startswith(_MODULES_HEAD) and boundary is not None:
        return head_name(boundary, name.removeprefix(_MODULES_HEAD))
    return name
