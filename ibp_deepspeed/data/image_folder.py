"""A folder of images: a folder for each class, in folders for the splits or not."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ibp_deepspeed.data.images import ImageData, OpenedImages, digest_of, with_held_out
from ibp_deepspeed.errors import DataError

_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
_IN_WORDS = ", ".join(sorted(_ENDINGS))
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_TRAIN, _HELD_OUT = "train", ("validation", "val", "valid", "test")


def read_folder(folder: Path, size: int, channels: int, held_out_fraction: float) -> ImageData:
    """Images FOLDER/[train|validation|val|valid|test/]CLASS/*.{jpg,jpeg,png,bmp,webp}, classes in the order of names.

    Raises:
        DataError: no images, or a class that one split has alone.
    """
    parts = [folder / _TRAIN] if (folder / _TRAIN).is_dir() else [folder]
    if parts[0] != folder:
        parts += [folder / name for name in _HELD_OUT if (folder / name).is_dir()][:1]
    classes = _classes(parts[0])
    splits, digest = [], []
    for part in parts:
        unknown = sorted(set(_classes(part)) - set(classes))
        if unknown:
            raise DataError(f"{part} has a class {unknown[0]!r}, which {parts[0]} has not: put images of it there")
        files = [(path, label) for label, name in enumerate(classes) for path in _files(part / name)]
        if not files:
            raise DataError(f"{part} has no images ({_IN_WORDS}) in folders of classes: put some there")
        digest += [f"{path.relative_to(folder)} {path.stat().st_size}".encode() for path, _ in files]
        paths, labels = [path for path, _ in files], [label for _, label in files]
        splits.append(OpenedImages(str(part), lambda i, paths=paths: read_image(paths[i]), labels, size, channels))  # type: ignore[misc]
    train, held_out = splits if len(splits) > 1 else with_held_out(splits[0], held_out_fraction)
    return ImageData(str(folder), train, held_out, classes, digest_of(*digest))


def read_image(path: Path) -> Image.Image:
    """An image file of a format that is common.

    Raises:
        DataError: it can't be read as one, or has more pixels than an image ought to have.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} can't be read as an image: {type(error).__name__}; remove it, or mend it") from error


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS and path.is_file())
