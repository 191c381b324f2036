"""Micro-batches of images: flipped and shifted in training, the same on every stage; and those of an evaluation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ibp_deepspeed.data.images import ImageData, Pixels
from ibp_deepspeed.data.sample_loader import Indices, MicroBatch, SampleLoader
from ibp_deepspeed.data.share import Share
from ibp_deepspeed.data.spread import Spread

SHIFT = 8
"""Images are shifted by up to an 8th of their size, 4 of CIFAR's 32 pixels, as by a crop of the padded image."""


class Normaliser:
    """Pixels → what a model reads: each channel of the training data has mean 0 and deviation 1.

    Args:
        data: whose training images count.
        reads: whether pixels are read at all: the first stage needs them, the others labels alone.
    """

    def __init__(self, data: ImageData, reads: bool) -> None:
        self.reads = reads
        if reads:
            self._mean, self._deviation = (torch.tensor(each).view(-1, 1, 1) for each in data.statistics)

    def __call__(self, pixels: Pixels) -> Tensor:
        """[B, S, S, C] → [B, C, S, S] in fp32."""
        images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
        return ((images - self._mean) / self._deviation).contiguous()


class ImageLoader(SampleLoader):
    """An endless iterator over training micro-batches (images [B, C, S, S] in fp32, classes [B], sample ids [B]).

    What is drawn for an image depends on the seed, the epoch and its number alone: not on the batch that it is in, so
    that a run resumes, in batches of another size too. The order of the samples: see SampleLoader.

    Args:
        data: its training split.
        micro_batch_size: B.
        data_parallel_rank, data_parallel_size: whose part of each global micro-batch this is.
        seed: of the order, and of what is drawn.
        start: the first micro-batch.
        crop, flip: shift images, mirror every second one.
        reads_pixels: False gives no images, for stages that read labels alone.

    Raises:
        DataError: an argument is out of range, or the data have less than one global micro-batch.
    """

    def __init__(
        self,
        data: ImageData,
        micro_batch_size: int,
        *,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        seed: int = 0,
        start: int = 0,
        crop: bool = True,
        flip: bool = True,
        reads_pixels: bool = True,
    ) -> None:
        share = Share(micro_batch_size, data_parallel_rank, data_parallel_size)
        self.samples, self._crop, self._flip = data.train, crop, flip
        self._normalise = Normaliser(data, reads_pixels)
        super().__init__(data.train, share, seed=seed, shuffle=True, start=start)

    def _take(self, samples: Indices, epoch: int) -> MicroBatch:
        labels = torch.from_numpy(self.samples.labels[samples])
        images = torch.empty(0)
        if self._normalise.reads:
            pixels = self.samples.pixels(samples)
            images = self._normalise(np.stack([self._drawn(p, epoch, i) for p, i in zip(pixels, samples, strict=True)]))
        return images, labels, torch.from_numpy(samples.copy())

    def _drawn(self, pixels: Pixels, epoch: int, sample: int) -> Pixels:
        """One image [S, S, C], as it comes in an epoch."""
        generator = np.random.Generator(np.random.PCG64([self._seed, epoch, int(sample)]))
        top, left, mirrored = generator.integers(0, 2**16, 3)
        if self._crop:
            size = len(pixels)
            most = max(1, size // SHIFT)
            padded = np.pad(pixels, ((most, most), (most, most), (0, 0)))
            top, left = top % (2 * most + 1), left % (2 * most + 1)
            pixels = padded[top : top + size, left : left + size]
        return pixels[:, ::-1] if self._flip and mirrored % 2 else pixels


class HeldOutImages(Spread):
    """The same micro-batches of held-out images at every iteration, unchanged, in the form of the loader's.

    Args:
        data: its held-out split.
        micro_batch_size: B.
        data_parallel_rank, data_parallel_size: whose part of each global micro-batch this is.
        samples: how many, all ranks together; None, or more than there are: all.
        reads_pixels: as of the loader.

    Raises:
        DataError: there is none, or an argument is out of range.
    """

    def __init__(
        self,
        data: ImageData,
        micro_batch_size: int,
        *,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        samples: int | None = None,
        reads_pixels: bool = True,
    ) -> None:
        data.held_out.require(1, "an evaluation")
        self._images, self._normalise = data.held_out, Normaliser(data, reads_pixels)
        super().__init__(len(data.held_out), Share(micro_batch_size, data_parallel_rank, data_parallel_size), samples)

    def describe(self) -> str:
        """How much of the split that is, in words."""
        part = "all" if self.samples == self.available else f"{self.samples:,} of"
        return f"{part} {self.available:,} held-out images"

    def remarks(self) -> list[str]:
        """Sentences on data that are left out: none are."""
        return []

    def _take(self, ids: Indices) -> MicroBatch:
        labels = torch.from_numpy(self._images.labels[ids])
        images = self._normalise(self._images.pixels(ids)) if self._normalise.reads else torch.empty(0)
        return images, labels, torch.from_numpy(ids.copy())
