"""From what a user names as data to images: a folder of some kind, or scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ibp_deepspeed.data.cifar import kind_of, read_cifar
from ibp_deepspeed.data.image_datasets import is_dataset, read_dataset
from ibp_deepspeed.data.image_folder import read_folder
from ibp_deepspeed.data.images import ArrayImages, ImageData, digest_of, with_held_out
from ibp_deepspeed.errors import DataError

DIGITS = "digits"


def open_images(source: str, size: int, channels: int, held_out_fraction: float = 0.1) -> ImageData:
    """The images that a source has, made ``size`` × ``size``.

    Args:
        source: ``digits``; a folder with CIFAR's files for Python, with a Hugging Face data set, or with classes.
        size: S.
        channels: 1 or 3.
        held_out_fraction: of the training images, where the source has no split that is held out.

    Raises:
        DataError: there is nothing of these kinds, or it can't be read.
    """
    if size < 1:
        raise DataError(f"--image-size is {size}: give 1 or more")
    if source == DIGITS and not Path(source).exists():
        return read_digits(size, channels, held_out_fraction)
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"--data {source} is no folder: give one, or {DIGITS} for scikit-learn's digits")
    kind = kind_of(folder)
    if kind is not None:
        return read_cifar(folder, kind, size, channels)
    if is_dataset(folder):
        return read_dataset(folder, size, channels, held_out_fraction)
    return read_folder(folder, size, channels, held_out_fraction)


def read_digits(size: int, channels: int, held_out_fraction: float) -> ImageData:
    """scikit-learn's 1,797 handwritten digits of 8 × 8 pixels, made larger where that is asked for.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(f"--data {DIGITS} needs scikit-learn, which has them: pip install scikit-learn") from None
    found = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
    everything = ArrayImages(DIGITS, pixels, found.target, size, channels)
    classes = tuple(str(name) for name in found.target_names)
    digest = digest_of(pixels.tobytes(), found.target.astype(np.int64).tobytes())
    return ImageData(DIGITS, *with_held_out(everything, held_out_fraction), classes, digest, flips=False)
