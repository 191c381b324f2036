"""All exits of a trained model in one process: every head and the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ibp_deepspeed.config import InterlockingConfig
from ibp_deepspeed.heads import CausalLMLoss
from ibp_deepspeed.module import aux_head_path
from models.causal_lm import CausalLM
from models.errors import ModelError
from models.export import assemble
from models.pipeline import Description


def find_checkpoint(path: str | Path) -> Path:
    """The folder of a checkpoint: itself, or the one that its parent's ``latest`` names.

    Raises:
        ModelError: there is none.
    """
    folder = Path(path)
    latest = folder / "latest"
    if latest.exists():
        folder = folder / latest.read_text(encoding="utf-8").strip()
    if not folder.is_dir():
        raise ModelError(f"there is no checkpoint in {path}: give a folder that train_lm.py wrote.")
    return folder


class Exits:
    """A checkpoint's model with its K exits, on one device.

    Args:
        path: the checkpoint, see :func:`find_checkpoint`.
        device: where the layers go.

    Raises:
        ModelError: a file that is missing or does not fit.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.folder = find_checkpoint(path)
        self.description = Description.read(self.folder)
        self._options = InterlockingConfig.parse(self.description.interlocking).aux_head
        self.model = CausalLM(self.description.config())
        self.device = torch.device(device)
        self.states = {i: _load(self._layer_path(i)) for i in range(self.model.num_layers)}
        self.layers = [self._filled(self.model.build_layer(i), self.states[i]) for i in range(self.model.num_layers)]
        self.heads = {stage: self._head(stage) for stage in range(len(self) - 1) if self._has_head(stage)}

    def __len__(self) -> int:
        """K."""
        return len(self.description.bounds) - 1

    @torch.no_grad()
    def losses(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Iterator[tuple[Tensor, int]]:
        """For each batch: the mean loss of each exit, NaN where there is no head [K], and its number of tokens."""
        loss_fn = CausalLMLoss()
        for input_ids, labels, _ in batches:
            hidden, labels = input_ids.to(self.device), labels.to(self.device)
            row = torch.full((len(self),), float("nan"), dtype=torch.float64)
            readers = {self._boundary(stage): (stage, head) for stage, head in self.heads.items()}
            for behind, layer in enumerate(self.layers, 1):
                hidden = layer(hidden)
                if behind in readers:
                    stage, head = readers[behind]
                    row[stage] = loss_fn(head(hidden), labels).double().cpu()
            row[-1] = loss_fn(hidden, labels).double().cpu()
            yield row, int((labels != -100).sum())

    def to_hugging_face(self) -> PreTrainedModel:
        """The whole model, without the heads."""
        return assemble(self.description.config(), self.states)

    def _has_head(self, stage: int) -> bool:
        return Path(self._head_path(stage)).exists()

    def _head(self, stage: int) -> nn.Module:
        assert self._options is not None
        head = self.model.aux_head(stage, self._options, after=self._boundary(stage) - 1)
        return self._filled(head, _load(Path(self._head_path(stage))))

    def _head_path(self, stage: int) -> str:
        return aux_head_path(str(self.folder), self._boundary(stage))

    def _boundary(self, stage: int) -> int:
        """The layer before which the head of a stage stands."""
        return self.description.bounds[stage + 1] + (self._options.borrow if self._options else 0)

    def _layer_path(self, index: int) -> Path:
        found = sorted(self.folder.glob(f"layer_{index:02d}-*model_states.pt"))
        if not found:
            raise ModelError(f"{self.folder} has no weights of layer {index} (layer_{index:02d}-…model_states.pt).")
        return found[0]

    def _filled(self, module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
        try:
            module.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        except RuntimeError as error:
            raise ModelError(f"weights in {self.folder} don't fit the model: {str(error).splitlines()[-1]}") from error
        return module.to(self.device).eval()


def _load(path: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ModelError(f"{path} can't be read: {str(error).splitlines()[0]}") from error
    return state
