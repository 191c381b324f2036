"""Checkpoint folders that are whole or not there: written beside, made durable, renamed, and only then named in
``latest``."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ibp_deepspeed.atomic_files import replace_folder, write_whole
from ibp_deepspeed.checkpoint.manifest import CheckpointError, Contents, Shape
from ibp_deepspeed.checkpoint.reader import NAMES_KEY
from ibp_deepspeed.rng import RandomState

LATEST = "latest"
_WRITERS = ("PytorchStreamWriter", "iostream")  # in what torch.save says, which is no OSError


class WholeCheckpoints:
    """Before an engine's base class: its ``save_checkpoint``, in a folder of another name until it is complete.

    Beside DeepSpeed's files a checkpoint has the random states of each rank and a list of its contents. It loads into
    another shape too: another number of stages, other heads, another number of replicas.

    Attributes:
        loaded_shape: that of the last loaded checkpoint, None if it doesn't say.
        load_report: what this rank's last :meth:`load_checkpoint` had to change, for the user; empty if nothing.
    """

    global_rank: int
    global_steps: int
    loaded_shape: Shape | None = None
    load_report: list[str] = []

    @abstractmethod
    def checkpoint_shape(self) -> Shape:
        """The shape that decides what the files of a checkpoint hold."""

    @abstractmethod
    def stage_names(self) -> dict[str, str]:
        """Of this rank's trained parameters: name in its module → name in the model, in the optimizer's order."""

    def loads_by_name(self) -> bool:
        """Whether DeepSpeed can't load what it has written."""
        return False

    @abstractmethod
    def load_reshaped(self, folder: Path, shape: Shape) -> tuple[list[str], dict[str, Any]]:
        """Load a checkpoint of another shape; returns lines for the user, and the client's state."""

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
            state = {**(client_state or {}), NAMES_KEY: list(self.stage_names().values())}
            super().save_checkpoint(  # type: ignore[misc]
                str(folder), partial(name), state, False, exclude_frozen_parameters
            )
            save_random_state(folder / partial(name), self.global_rank)
            if first:
                write_texts(folder / partial(name), files or {})
            dist.barrier()
            if first:
                Contents.write(folder / partial(name), self.checkpoint_shape())
                publish(folder, name, latest=save_latest)
            dist.barrier()

    def load_checkpoint(self, load_dir: str | Path, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Overrides DeepSpeedEngine's: checks the files, and loads a checkpoint of another shape too.

        Random states come back if there are as many ranks as when it was saved.

        Raises:
            CheckpointError: there is none, a file is missing, damaged or doesn't fit.
        """
        if self.global_rank == 0:
            restore(Path(load_dir))
        dist.barrier()
        name = str(tag) if tag is not None else newest_tag(Path(load_dir))
        folder = Path(load_dir) / name
        contents = check(folder)
        self.loaded_shape, self.load_report = contents.shape if contents is not None else None, []
        same = self.loaded_shape == self.checkpoint_shape()
        if contents is None or (same and not self.loads_by_name()):
            path, client_state = super().load_checkpoint(str(load_dir), name, *args, **kwargs)  # type: ignore[misc]
        else:
            lines, client_state = self.load_reshaped(folder, contents.shape)
            self.load_report = [] if same else lines
            path = str(folder / "reshaped")
        if path is not None:
            load_random_state(folder, self.global_rank, dist.get_world_size())
        return path, client_state


def newest_tag(folder: Path) -> str:
    """What ``latest`` says.

    Raises:
        CheckpointError: there is no such file.
    """
    try:
        return (folder / LATEST).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise CheckpointError(f"{folder} has no checkpoints: {error.strerror} ({LATEST}).") from error


def check(folder: Path) -> Contents | None:
    """The contents of a checkpoint whose files are all there; None for one of an earlier version, without a list.

    Raises:
        CheckpointError: it is damaged; says which others are whole.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}.")
    try:
        contents = Contents.read(folder)
        if contents is not None:
            contents.check(folder)
    except CheckpointError as error:
        whole = [path.name for path in sorted(folder.parent.iterdir()) if path != folder and _is_whole(path)]
        others = f"whole are {', '.join(whole)}" if whole else "there is no whole one beside it"
        raise CheckpointError(f"{error} Resume from another checkpoint: {others}.") from error
    return contents


def _is_whole(folder: Path) -> bool:
    try:
        contents = Contents.read(folder) if folder.is_dir() else None
        if contents is not None:
            contents.check(folder)
    except CheckpointError:
        return False
    return contents is not None


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
    if len(list(folder.glob(_random_state_file("*")))) == ranks:
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
    replace_folder(folder / partial(tag), folder / tag, folder / replaced(tag))
    if latest:
        write_whole(folder / LATEST, tag)


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
