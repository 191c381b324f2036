"""Files of torch.save, read without running what is in them: they are pickles, and a pickle can call any function."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ibp_deepspeed.errors import CheckpointError, first_line

OF_DEEPSPEED = (LossScaler, ZeroStageEnum, fragment_address)
"""Classes in the files of its partitioned optimizers: numbers with names, which do nothing when they are made."""


def read(path: Path) -> dict[str, Any]:
    """A state dict, on the CPU, mapped rather than copied where its format allows that.

    Raises:
        CheckpointError: it is missing or damaged, or holds what might run code.
    """
    state = _loaded(path, "cpu", mapped=True)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} can't be read: it holds a {type(state).__name__}, not a state dict.")
    return state


def load(path: str | Path, map_location: Any = None) -> Any:
    """In the place of the ``load`` of DeepSpeed's checkpoint engines: what is in a file, in memory of its own.

    Raises:
        CheckpointError: see :func:`read`.
    """
    return _loaded(Path(path), map_location, mapped=False)


def _loaded(path: Path, map_location: Any, *, mapped: bool) -> Any:
    try:
        if zipfile.is_zipfile(path):
            _check_records(path)
        else:
            mapped = False  # the format of before, which DeepSpeed can be told to write
        with torch.serialization.safe_globals(list(OF_DEEPSPEED)):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(_untrusted(path, error)) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path} can't be read: {first_line(error)}") from error


def _check_records(path: Path) -> None:
    """torch.save compresses nothing; what is compressed could be a thousand times as large in memory."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("its records are compressed, which torch.save does not do")
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise ValueError("its records are longer than the file")


def _untrusted(path: Path, error: Exception) -> str:
    """What is wrong with a file that weights alone don't need."""
    with torch.serialization.safe_globals(list(OF_DEEPSPEED)):
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        except Exception:  # what its parser doesn't know either
            names = []
    if not names:
        return f"{path} can't be read: {first_line(error)}"
    return (
        f"{path} holds {', '.join(sorted(names))}, which could run any code, so it is not read: if you know who wrote "
        "the file, allow it with torch.serialization.add_safe_globals before you load it."
    )
