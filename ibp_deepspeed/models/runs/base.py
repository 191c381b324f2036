"""The base model that a checkpoint's adapters belong to: its digest, and finding it again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from ibp_deepspeed.models.config import load_config
from ibp_deepspeed.models.errors import ModelError

if TYPE_CHECKING:
    from ibp_deepspeed.models.causal_lm import Weights

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "layer_*-*model_states.pt")
_SAMPLES, _BYTES = 16, 2**16
_DIGITS = 16


def weights_digest(folder: Path) -> str:
    """Of the weights in a Hugging Face folder or a checkpoint: names, sizes, and 16 blocks of 64 KiB of each file.

    The first block has the names and shapes of the tensors. To read every byte would take minutes for a large model,
    and a training changes all blocks.
    """
    found = hashlib.sha256()
    for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in sorted({max(0, size - _BYTES) * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
                file.seek(start)
                found.update(file.read(_BYTES))
    return found.hexdigest()[:_DIGITS]


def base_weights(init_from: str, digest: str, holder: Path) -> Weights:
    """The weights of the base model.

    Args:
        init_from: its folder or hub name.
        digest: what it had when the adapters were trained.
        holder: the checkpoint with the adapters.

    Raises:
        ModelError: it is not there, or another model is.
    """
    from ibp_deepspeed.models.hf.weights import PretrainedWeights, local_folder
    from ibp_deepspeed.models.runs.checkpoint import Checkpoint

    way = f"{holder} holds adapters alone: put the model that they were trained on in its place"
    if Checkpoint.is_in(init_from):
        found: Weights = Checkpoint(init_from)
        folder = found.folder  # type: ignore[attr-defined]
    else:
        try:
            folder = local_folder(init_from)
        except ModelError as error:
            raise ModelError(f"{error}; {way}.") from None
        found = PretrainedWeights(folder, load_config(folder))  # which says whether its LM head is tied
    seen = weights_digest(folder)
    if seen != digest:
        raise ModelError(f"{init_from} has other weights than before (digest {seen}, was {digest}); {way}.")
    return found
