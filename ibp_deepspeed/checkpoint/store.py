"""Checkpoint folders that are complete or not there: written beside, made durable, renamed, and only then named in
``latest``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ibp_deepspeed.atomic_files import remove, replace_folder, replace_text
from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.checkpoint.manifest import CheckpointManifest, PipelineShape
from ibp_deepspeed.checkpoint.tensor_file import read
from ibp_deepspeed.errors import CheckpointError, first_line
from ibp_deepspeed.folders import check_entries, relative_name
from ibp_deepspeed.json_text import small_text
from ibp_deepspeed.rng import RandomState

_WRITERS = ("PytorchStreamWriter", "iostream", "inline_container")  # in what torch.save says, which is no OSError


class CheckpointStore:
    """How the ranks of a job write and find checkpoints together; the files themselves are made by others.

    Args:
        rank: of this process, from 0.
        ranks: of the job.
        barrier: returns when all ranks have called it.
    """

    def __init__(self, rank: int = 0, ranks: int = 1, barrier: Callable[[], None] = lambda: None) -> None:
        self._rank, self._ranks, self._barrier = rank, ranks, barrier

    def save(
        self,
        folder: Path,
        tag: str,
        shape: PipelineShape,
        write: Callable[[Path], None],
        *,
        files: Mapping[str, str],
        latest: bool = True,
    ) -> None:
        """On all ranks together: a kill at any moment leaves the checkpoint before complete.

        Args:
            folder: of all checkpoints.
            tag: name of this one; one of that name is replaced.
            shape: of the pipeline that writes it.
            write: makes the folder that it is given, and this rank's files in it; other ranks' wait in it for rank 0.
            files: texts to write into it, by file name, which may have a folder before it.
            latest: whether ``latest`` is to name it.

        Raises:
            CheckpointError: it can't be written; ``latest`` still names the one before.
        """
        made, first = folder / layout.partial(tag), self._rank == 0
        with write_errors(folder / tag):
            if first:
                clear(folder, tag)
            write(made)
            save_random_state(made, self._rank)
            if first:
                write_texts(made, files)
            self._barrier()
            if first:
                CheckpointManifest.write(made, shape)
                publish(folder, tag, latest=latest)
            self._barrier()

    def open(self, folder: Path, tag: str | None) -> tuple[Path, CheckpointManifest | None]:
        """On all ranks together: the folder of a checkpoint (None: the newest), and its manifest if it has one.

        Raises:
            CheckpointError: there is none, or a file is missing or damaged.
        """
        if self._rank == 0:
            undo_interrupted_replacements(folder)
        self._barrier()
        path = tagged(folder, tag if tag is not None else newest_tag(folder))
        return path, checked(path)

    def resume_random_state(self, path: Path) -> None:
        """Resume this rank's random states; with other ones if another number of ranks wrote the checkpoint."""
        load_random_state(path, self._rank, self._ranks)


def newest_tag(folder: Path) -> str:
    """What ``latest`` says: the name of a folder in this one.

    Raises:
        CheckpointError: there is no such file, it is a link, or what it says is no such name.
    """
    path = folder / layout.LATEST
    try:
        return relative_name(small_text(no_link(path)).strip())
    except OSError as error:
        raise CheckpointError(f"{folder} has no checkpoints: {error.strerror} ({layout.LATEST}).") from error
    except ValueError as error:
        raise CheckpointError(f"{path} can't be read: {error}.") from error


def tagged(folder: Path, tag: str) -> Path:
    """The folder of a checkpoint.

    Raises:
        CheckpointError: the tag leads out of ``folder``, or names a link.
    """
    try:
        return no_link(folder / relative_name(tag))
    except ValueError as error:
        raise CheckpointError(f"there is no such checkpoint: {error}.") from error


def checked(folder: Path) -> CheckpointManifest | None:
    """The manifest of a checkpoint whose files are all there; None for one of an earlier version, without a manifest.

    Raises:
        CheckpointError: it is a link, or damaged; says which others are complete.
    """
    if not no_link(folder).is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}.")
    try:
        manifest = _whole(folder)
    except CheckpointError as error:
        complete = [path.name for path in sorted(folder.parent.iterdir()) if path != folder and _is_complete(path)]
        others = f"complete are {', '.join(complete)}" if complete else "there is no complete one beside it"
        raise CheckpointError(f"{error} Resume from another checkpoint: {others}.") from error
    return manifest


def check_plain(folder: Path) -> None:
    """Raises a CheckpointError if something in a checkpoint leads out of it, or is neither file nor folder."""
    try:
        check_entries(folder)
    except ValueError as error:
        raise CheckpointError(f"{folder} can't be read: {error}.") from error


def _whole(folder: Path) -> CheckpointManifest | None:
    check_plain(folder)
    manifest = CheckpointManifest.read(folder)
    if manifest is not None:
        manifest.check(folder)
    return manifest


def no_link(path: Path) -> Path:
    """A file or folder among checkpoints, which are this run's own.

    Raises:
        CheckpointError: it is a symbolic link, to another run's perhaps, which would be read, replaced or removed.
    """
    if path.is_symlink():
        raise CheckpointError(f"{path} is a symbolic link, which is not followed: put what it names in its place.")
    return path


def _is_complete(folder: Path) -> bool:
    try:
        return _is_folder(folder) and _whole(folder) is not None
    except CheckpointError:
        return False


def write_texts(folder: Path, files: Mapping[str, str]) -> None:
    """Write texts by file name, which may have a folder before it."""
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def save_random_state(folder: Path, rank: int) -> None:
    """Write this rank's random states to a checkpoint."""
    torch.save(RandomState().state_dict(), folder / layout.random_state(rank))


def load_random_state(folder: Path, rank: int, ranks: int) -> None:
    """Resume the random states of a checkpoint; with other ones if it was written by another number of ranks."""
    if len(list(folder.glob(layout.ANY_RANDOM_STATE))) != ranks:
        return
    path = folder / layout.random_state(rank)
    try:
        RandomState.from_state_dict(read(path)).set()
    except (KeyError, TypeError, RuntimeError) as error:  # a state of another size, or none
        raise CheckpointError(f"{path} is no state of random generators: {first_line(error)}.") from error


def clear(folder: Path, tag: str) -> None:
    """Remove what interrupted saves left, also of other batches: a run that goes on may save after those."""
    undo_interrupted_replacements(folder)
    for path in [folder / layout.partial(tag), *layout.partials(folder)]:
        remove(path)


def undo_interrupted_replacements(folder: Path) -> None:
    """Undo replacements that were interrupted between their two renames."""
    for old, place in layout.interrupted_replacements(folder).items():
        if place.exists():
            remove(old)
        else:
            old.rename(place)


def publish(folder: Path, tag: str, *, latest: bool = True) -> None:
    """Make a complete partial checkpoint durable and give it its name, and ``latest`` that name."""
    replace_folder(folder / layout.partial(tag), folder / tag, folder / layout.replaced(tag))
    if latest:
        replace_text(folder / layout.LATEST, tag)


def keep_newest(folder: Path, count: int) -> list[str]:
    """Remove all but the ``count`` newest checkpoints; returns the names of the removed.

    Args:
        folder: of checkpoints; folders that are named otherwise, and links, are left alone.
        count: at least 1; the one that ``latest`` names is always kept.
    """
    latest = newest_tag(folder) if (folder / layout.LATEST).exists() else None
    ours = [(age, p) for p in folder.iterdir() if _is_folder(p) and (age := layout.batches_of(p.name)) is not None]
    old = [path for _, path in sorted(ours)[:-count] if path.name != latest]
    for path in old:
        # renamed first: a kill leaves no half of a checkpoint under its name
        doomed = path.rename(path.with_name(layout.partial(path.name)))
        shutil.rmtree(doomed)
    return [path.name for path in old]


def _is_folder(path: Path) -> bool:
    """A link is nobody's to remove."""
    return path.is_dir() and not path.is_symlink()


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
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
        began = error.__context__ or error  # torch fails once more when it closes what it could not write
        reason = f"{first_line(began)} (is the device full?)"
        raise CheckpointError(f"can't write the checkpoint {path}: {reason}.") from error
