"""Images of a Hugging Face data set on the disk (``save_to_disk``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ibp_deepspeed.data.images import ImageData, OpenedImages, digest_of, with_held_out
from ibp_deepspeed.errors import DataError, first_line

_HELD_OUT = ("validation", "valid", "test")


def is_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote it."""
    return (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists()


def read_dataset(folder: Path, size: int, channels: int, held_out_fraction: float) -> ImageData:
    """Its first column of images and first column of classes.

    Raises:
        DataError: it can't be read, or has no such column.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # of any of its file formats
        raise DataError(f"{folder} can't be read as a data set: {first_line(error)}") from error
    parts = _parts(found, folder)
    features = parts[0].features
    image = _column(features, datasets.Image, "images", folder)
    label = _column(features, datasets.ClassLabel, "classes (ClassLabel)", folder)
    splits = [
        OpenedImages(str(folder), lambda i, part=part: part[i][image], part[label], size, channels)  # type: ignore[misc]
        for part in parts
    ]
    train, held_out = splits if len(splits) > 1 else with_held_out(splits[0], held_out_fraction)
    digest = digest_of(*(str(part._fingerprint).encode() for part in parts))
    return ImageData(str(folder), train, held_out, tuple(features[label].names), digest)


def _parts(found: Any, folder: Path) -> list[Any]:
    """Training, and what is held out if there is a split of that kind."""
    if not isinstance(found, Mapping):
        return [found]
    if "train" not in found:
        raise DataError(f"{folder} has the splits {', '.join(found)}: one of them has to be called train")
    return [found["train"], *[found[name] for name in _HELD_OUT if name in found][:1]]


def _column(features: Mapping[str, Any], kind: type, what: str, folder: Path) -> str:
    for name, feature in features.items():
        if isinstance(feature, kind):
            return name
    raise DataError(f"{folder} has the columns {', '.join(features)}, none of {what}: cast one to that feature")
