"""Images with classes, in two splits: pixels that a model takes, whatever file or array they come from."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from ibp_deepspeed.data.sample_loader import Indices
from ibp_deepspeed.errors import DataError

Pixels = npt.NDArray[np.uint8]
_MODES = {1: "L", 3: "RGB"}
_COUNTED = 2000  # images that means and deviations are taken of


class ImageSplit(ABC):
    """Images of one size with their classes.

    Args:
        name: of the data, for messages.
        labels: classes from 0, [N].

    Attributes:
        labels: the same, int64.
    """

    def __init__(self, name: str, labels: Sequence[int] | npt.NDArray[np.int64]) -> None:
        self.name, self.labels = name, np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def pixels(self, indices: Indices) -> Pixels:
        """Images [B, S, S, C] of 0 … 255."""

    def require(self, count: int, what: str, way: str = "") -> None:
        """Raises DataError when there are fewer than `count` images, which `what` needs; `way` is one more way out."""
        if len(self) < count:
            raise DataError(f"{self.name} has {len(self)} images, {what} needs {count}: lower the batch sizes{way}")

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel in 0 … 1, of up to 2,000 images spread over the split."""
        count = min(len(self), _COUNTED)
        some = self.pixels(np.arange(count, dtype=np.int64) * len(self) // count) / 255.0
        return some.mean((0, 1, 2)).tolist(), np.maximum(some.std((0, 1, 2)), 1e-3).tolist()


class ArrayImages(ImageSplit):
    """Images in memory, [N, h, w, C] or [N, h, w]; they are made S × S once."""

    def __init__(self, name: str, pixels: Pixels, labels: Sequence[int], size: int, channels: int) -> None:
        super().__init__(name, labels)
        self._pixels = np.stack([fitted(Image.fromarray(image), size, channels) for image in pixels])

    def pixels(self, indices: Indices) -> Pixels:
        return self._pixels[indices]


class OpenedImages(ImageSplit):
    """Images that are read when they are asked for.

    Args:
        read: index → image, of any size and mode.
    """

    def __init__(
        self, name: str, read: Callable[[int], Image.Image], labels: Sequence[int], size: int, channels: int
    ) -> None:
        super().__init__(name, labels)
        self._read, self._size, self._channels = read, size, channels

    def pixels(self, indices: Indices) -> Pixels:
        return np.stack([fitted(self._read(int(index)), self._size, self._channels) for index in indices])


class Some(ImageSplit):
    """Some of a split's images."""

    def __init__(self, of: ImageSplit, indices: Indices) -> None:
        super().__init__(of.name, of.labels[indices])
        self._of, self._indices = of, indices

    def pixels(self, indices: Indices) -> Pixels:
        return self._of.pixels(self._indices[indices])


@dataclass(frozen=True)
class ImageData:
    """What a training reads.

    Attributes:
        name: where it is from.
        train, held_out: the splits.
        classes: names.
        digest: of names and contents of files, or of pixels, and of classes: the same data have the same.
        flips: whether an image's mirror image has its class.
        known: statistics of other training images, which a model has learned with; None: those of these.
    """

    name: str
    train: ImageSplit
    held_out: ImageSplit
    classes: tuple[str, ...]
    digest: str
    flips: bool = True
    known: tuple[list[float], list[float]] | None = None

    @cached_property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel, of the training split, see :meth:`ImageSplit.statistics`."""
        return self.known or self.train.statistics()


def fitted(image: Image.Image, size: int, channels: int) -> Pixels:
    """An image [S, S, C]: its shorter side scaled to S, the middle of the longer one."""
    if channels not in _MODES:
        raise DataError(f"a model that takes images of {channels} channels: give one that takes 1 or 3")
    image = image.convert(_MODES[channels])
    if min(image.size) != size:
        scale = size / min(image.size)
        wanted = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
        image = image.resize(wanted, Image.Resampling.BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.uint8)
    return pixels.reshape(size, size, channels)


def with_held_out(all_images: ImageSplit, fraction: float) -> tuple[ImageSplit, ImageSplit]:
    """Both splits of images that have one: every n-th image is held out, n = 1/fraction.

    Raises:
        DataError: a fraction that leaves no image on one side.
    """
    if not 0 < fraction <= 0.5:
        raise DataError(f"--held-out-fraction is {fraction:g}: give a part above 0, at most 0.5")
    every = round(1 / fraction)
    numbers = np.arange(len(all_images), dtype=np.int64)
    held_out = numbers % every == every - 1
    if not held_out.any():
        raise DataError(f"{all_images.name} has {len(all_images)} images, of which 1 in {every} is none: hold out more")
    return Some(all_images, numbers[~held_out]), Some(all_images, numbers[held_out])


def digest_of(*parts: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()
