"""Checkpoint folders that are whole or not there: written beside, made durable, renamed, and only then named in
``latest``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ibp_deepspeed.errors import InterlockingError
from ibp_deepspeed.random_state import RandomState

LATEST = "latest"
_WRITERS = ("PytorchStreamWriter", "iostream")  # in what torch.save says, which is no OSError


class CheckpointError(InterlockingError):
    """A checkpoint that can't be written or read."""


class WholeCheckpoints:
    """Before an engine's base class: its ``save_checkpoint``, in a folder of another name until it is complete.

    Beside DeepSpeed's files a checkpoint has the random states of each rank.
    """

    global_rank: int
    global_steps: int

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Overrides DeepSpeedEngine's, on all ranks together: a kill at any moment leaves the one before whole.

        Args:
            save_dir: folder of all checkpoints.
            tag: name of this one (default ``global_step<batches>``); one of that name is replaced.
            client_state, save_latest, exclude_frozen_parameters: as in DeepSpeed.
            files: texts to write into it, by file name, which may have a folder before it.

        Raises:
            CheckpointError: it can't be written; ``latest`` still names the one before.
        """
        name = str(tag or f"global_step{self.global_steps}")
        folder, first = Path(save_dir), self.global_rank == 0
        with written(folder / name):
            if first:
                clear(folder, name)  # DeepSpeed lets the others begin after this rank
            super().save_checkpoint(  # type: ignore[misc]
                str(folder), partial(name), dict(client_state or {}), False, exclude_frozen_parameters
            )
            save_random_state(folder / partial(name), self.global_rank)
            if first:
                write_texts(folder / partial(name), files or {})
            dist.barrier()
            if first:
                publish(folder, name, latest=save_latest)
            dist.barrier()

    def load_checkpoint(self, load_dir: str | Path, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Overrides DeepSpeedEngine's: random states come back too, if there are as many ranks as when it was saved."""
        if self.global_rank == 0:
            restore(Path(load_dir))
        dist.barrier()
        path, client_state = super().load_checkpoint(str(load_dir), tag, *args, **kwargs)  # type: ignore[misc]
        if path is not None:
            load_random_state(Path(path).parent, self.global_rank, dist.get_world_size())
        return path, client_state


def write_texts(folder: Path, files: Mapping[str, str]) -> None:
    """Write texts by file name, which may have a folder before it."""
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def save_random_state(folder: Path, rank: int) -> None:
    """Write this rank's random states to a checkpoint."""
    torch.save(RandomState().state_dict(), folder / _random_state_file(rank))


def load_random_state(folder: Path, rank: int, ranks: int) -> None:
    """Go on with the random states of a checkpoint; with other ones if it was written by another number of ranks."""
    written = len(list(folder.glob(_random_state_file("*"))))
    if written == ranks:
        RandomState.from_state_dict(torch.load(folder / _random_state_file(rank), weights_only=True)).set()


def _random_state_file(rank: int | str) -> str:
    return f"random_states_{rank}.pt"


def partial(tag: str) -> str:
    """The name of a checkpoint that is being written."""
    return f"{tag}.partial"


def replaced(tag: str) -> str:
    """The name of a checkpoint whose place a newer one of the same name is taking."""
    return f"{tag}.replaced"


def clear(folder: Path, tag: str) -> None:
    """Remove what an interrupted save of that name left."""
    restore(folder)
    shutil.rmtree(folder / partial(tag), ignore_errors=True)


def restore(folder: Path) -> None:
    """Undo a replacement that was interrupted between its two renames."""
    for old in folder.glob(replaced("*")):
        place = old.with_name(old.name.removesuffix(replaced("")))
        if place.exists():
            shutil.rmtree(old)
        else:
            old.rename(place)


def publish(folder: Path, tag: str, *, latest: bool = True) -> None:
    """Make a complete partial checkpoint durable and give it its name, and ``latest`` that name."""
    made, place, old = folder / partial(tag), folder / tag, folder / replaced(tag)
    for path in [*made.rglob("*"), made]:
        _sync(path)
    if place.exists():
        place.rename(old)
    made.rename(place)
    _sync(folder)
    if latest:
        _write_whole(folder / LATEST, tag)
    shutil.rmtree(old, ignore_errors=True)


def keep_newest(folder: Path, count: int, tags: Callable[[str], int | None]) -> list[str]:
    """Remove all but the ``count`` newest checkpoints; returns the names of the removed.

    Args:
        folder: of checkpoints.
        count: at least 1; the one that ``latest`` names is always kept.
        tags: a folder's name → its age in batches, None for a folder that is none of ours.
    """
    latest = (folder / LATEST).read_text(encoding="utf-8").strip() if (folder / LATEST).exists() else None
    ours = [(age, path) for path in folder.iterdir() if path.is_dir() and (age := tags(path.name)) is not None]
    old = [path for _, path in sorted(ours)[:-count] if path.name != latest]
    for path in old:
        # renamed first: a kill leaves no half of a checkpoint under its name
        doomed = path.rename(path.with_name(partial(path.name)))
        shutil.rmtree(doomed)
    return [path.name for path in old]


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Around the writing of a checkpoint: what the device refuses becomes one sentence.

    Raises:
        CheckpointError: it can't be written.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"can't write the checkpoint {path}: {error.strerror or error}.") from error
    except RuntimeError as error:
        if not any(writer in str(error) for writer in _WRITERS):
            raise
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"can't write the checkpoint {path}: {reason} (is the device full?).") from error


def _write_whole(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    _sync(new)
    os.replace(new, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
