"""CIFAR-10 and CIFAR-100 from their files for Python (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ibp_deepspeed.data.images import ArrayImages, ImageData, ImageSplit, digest_of
from ibp_deepspeed.data.plain_pickle import read_plain
from ibp_deepspeed.errors import DataError

_SIDE = 32


@dataclass(frozen=True)
class Cifar:
    """One of the two.

    Attributes:
        name: of it.
        train, test: file → MD5, which its authors' archive has.
        meta: file of the classes' names, and its MD5.
        names, labels: where these are in the files.
    """

    name: str
    train: dict[str, str]
    test: dict[str, str]
    meta: tuple[str, str]
    names: bytes
    labels: bytes


KINDS = (
    Cifar(
        "CIFAR-10",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        {"test_batch": "40351d587109b95175f43aff81a1287e"},
        ("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
        b"label_names",
        b"labels",
    ),
    Cifar(
        "CIFAR-100",
        {"train": "16019d7e3df5f24257cddd939b257f8d"},
        {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        ("meta", "7973b15100ade9c7d40fb424638fde48"),
        b"fine_label_names",
        b"fine_labels",
    ),
)


def kind_of(folder: Path) -> Cifar | None:
    """Which of the two a folder has the files of; None: neither."""
    return next((kind for kind in KINDS if all((folder / f).is_file() for f in (*kind.train, kind.meta[0]))), None)


def read_cifar(folder: Path, kind: Cifar, size: int, channels: int) -> ImageData:
    """Its images; the test images are held out.

    Raises:
        DataError: a file is missing, or not as its authors published it.
    """
    meta = _checked(folder, *kind.meta)
    classes = tuple(name.decode("ascii") for name in read_plain(meta, kind.meta[0])[kind.names])
    splits: list[ImageSplit] = []
    for files in (kind.train, kind.test):
        batches = [_batch(folder, name, md5) for name, md5 in files.items()]
        pixels = np.concatenate([_images(batch) for batch in batches])
        labels = [int(label) for batch in batches for label in batch[kind.labels]]
        splits.append(ArrayImages(kind.name, pixels, labels, size, channels))
    digest = digest_of(*(md5.encode() for md5 in (*kind.train.values(), *kind.test.values())))
    train, test = splits
    return ImageData(kind.name, train, test, classes, digest)


def _batch(folder: Path, name: str, md5: str) -> dict[bytes, Any]:
    found: dict[bytes, Any] = read_plain(_checked(folder, name, md5), name)
    return found


def _images(batch: dict[bytes, Any]) -> np.ndarray[Any, Any]:
    """[N, 32, 32, 3] of rows [N, 3072], a channel after the other."""
    return batch[b"data"].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)


def _checked(folder: Path, name: str, md5: str) -> bytes:
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}; unpack its archive again") from None
    seen = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if seen != md5:
        raise DataError(f"{path} has the MD5 {seen}, as published it has {md5}: unpack its archive again")
    return content
