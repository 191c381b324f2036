"""Images from every source, and what the loader makes of them."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ibp_deepspeed.data import cifar
from ibp_deepspeed.data.image_loader import HeldOutImages, ImageLoader
from ibp_deepspeed.data.image_sources import open_images
from ibp_deepspeed.data.images import ImageData, fitted
from ibp_deepspeed.data.plain_pickle import read_plain
from ibp_deepspeed.errors import DataError

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return open_images("digits", 8, 1, 0.2)


def picture(colour: int, width: int = 12, height: int = 10) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), colour, dtype=np.uint8))


def test_digits_are_split_and_scaled(digits: ImageData) -> None:
    assert (len(digits.train), len(digits.held_out), digits.classes) == (1438, 359, tuple("0123456789"))
    assert digits.held_out.pixels(np.arange(3)).shape == (3, 8, 8, 1) and not digits.flips
    large = open_images("digits", 32, 3, 0.2)
    assert large.train.pixels(np.array([0])).shape == (1, 32, 32, 3) and large.digest == digits.digest


def test_an_image_folder_with_and_without_splits(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(10 * i + 100 * label).save(folder / f"{i}.png")
    data = open_images(str(tmp_path), 8, 3)
    assert data.classes == ("cat", "dog") and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.held_out.pixels(np.arange(4))[:, 0, 0, 0].tolist() == [0, 10, 100, 110]
    flat = open_images(str(tmp_path / "train"), 8, 1, 0.5)
    assert (len(flat.train), len(flat.held_out)) == (3, 3) and flat.digest != data.digest
    (tmp_path / "train/cat/0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="0.png can't be read as an image"):
        open_images(str(tmp_path), 8, 3).train.pixels(np.array([0]))
    (tmp_path / "val/cow").mkdir()
    with pytest.raises(DataError, match="has a class 'cow'"):
        open_images(str(tmp_path), 8, 3)


def test_a_hugging_face_data_set(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [picture(i) for i in range(10)], "label": [i % 2 for i in range(10)]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=whole, test=whole.select([3])).save_to_disk(tmp_path / "two")
    one, two = (open_images(str(tmp_path / name), 10, 1, 0.2) for name in ("one", "two"))
    assert (len(one.train), len(one.held_out), len(two.train), len(two.held_out)) == (8, 2, 10, 1)
    assert two.classes == ("a", "b") and two.held_out.pixels(np.array([0])).max() == 3


def cifar_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10's files with few images, in the pickles of Python 2 that its authors wrote, as far as Python 3 can."""
    kind = cifar.KINDS[0]
    contents: dict[str, dict[bytes, Any]] = {kind.meta[0]: {b"label_names": [f"class {i}".encode() for i in range(10)]}}
    for name in (*kind.train, *kind.test):
        rows = RANDOM.integers(0, 256, (4, 3072), dtype=np.uint8)
        contents[name] = {b"data": rows, b"labels": [1, 2, 3, 4]}
    sums = {}
    for number, (name, value) in enumerate(contents.items()):
        (folder / name).write_bytes(pickle.dumps(value, protocol=2 + number % 3))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    made = replace(
        kind,
        train={name: sums[name] for name in kind.train},
        test={name: sums[name] for name in kind.test},
        meta=(kind.meta[0], sums[kind.meta[0]]),
    )
    monkeypatch.setattr(cifar, "KINDS", (made, cifar.KINDS[1]))


def test_cifars_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar_files(tmp_path, monkeypatch)
    data = open_images(str(tmp_path), 32, 3)
    assert (len(data.train), len(data.held_out)) == (20, 4) and data.classes[3] == "class 3"
    rows = pickle.loads((tmp_path / "data_batch_2").read_bytes())[b"data"]
    assert np.array_equal(data.train.pixels(np.array([4]))[0], rows[0].reshape(3, 32, 32).transpose(1, 2, 0))
    (tmp_path / "test_batch").write_bytes(b"other")
    with pytest.raises(DataError, match="test_batch has the MD5 .*, as published it has"):
        open_images(str(tmp_path), 32, 3)


def test_old_byte_strings_are_read() -> None:
    """The opcodes of Python 2's str, which Python 3 doesn't write: {"labels": ["ab"]}."""
    assert read_plain(b"\x80\x02}q\x01U\x06labelsq\x02]q\x03U\x02abq\x04as.", "x") == {b"labels": [b"ab"]}


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps(Runs(), protocol=2), "the name '__builtin__ print'"),
        (pickle.dumps({"a": Runs()}, protocol=4), "the name 'builtins print'"),
        (pickle.dumps(np.array([Runs()], dtype=object), protocol=2), "the name '__builtin__ print'"),
        (pickle.dumps(np.array(["2020"], dtype="datetime64[Y]"), protocol=2), "pickle"),
        (b"\x80\x02Vos\nVsystem\n\x93.", "the instruction UNICODE"),
        (b"cnumpy\nndarray\n.", "the name numpy ndarray"),
        (b"\x80\x02", "pickle"),
        (b"\x80\x02R.", "an empty stack"),
        (b"", "pickle"),
    ],
)
def test_a_pickle_that_does_more_is_refused(content: bytes, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=said):
        read_plain(content, "file")
    assert not capsys.readouterr().out


def test_the_shorter_side_is_fitted_and_the_middle_taken() -> None:
    image = np.zeros((10, 30, 3), dtype=np.uint8)
    image[:, 10:20] = 200
    assert fitted(Image.fromarray(image), 10, 1).shape == (10, 10, 1)
    assert (fitted(Image.fromarray(image), 10, 1) == 200).all() and fitted(Image.fromarray(image), 5, 3)[2, 2, 0] > 190


def test_training_images_are_the_same_on_every_stage_and_after_a_resume(digits: ImageData) -> None:
    """What is drawn depends on seed, epoch and sample: not on micro-batch sizes, replicas or the stage."""
    whole, part = (
        ImageLoader(digits, 64, seed=1),
        ImageLoader(digits, 16, data_parallel_rank=1, data_parallel_size=4, seed=1),
    )
    images, labels, ids = next(whole)
    mine = next(part)
    for here, there in zip((images, labels, ids), mine, strict=True):
        assert torch.equal(here[16:32], there)
    blind = ImageLoader(digits, 64, seed=1, reads_pixels=False)
    nothing, same_labels, same_ids = next(blind)
    assert nothing.numel() == 0 and torch.equal(labels, same_labels) and torch.equal(ids, same_ids)
    resumed = ImageLoader(digits, 32, seed=1)
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(next(resumed)[0], next(whole)[0][:32])


def test_an_epoch_draws_anew_and_shifts_stay_within_an_eighth(digits: ImageData) -> None:
    plain = ImageLoader(digits, 1438, crop=False, flip=False)
    drawn, mirrored = ImageLoader(digits, 1438, flip=False), ImageLoader(digits, 1438, crop=False)
    before, after, flipped = next(plain)[0], next(drawn)[0], next(mirrored)[0]
    moved = [i for i in range(1438) if not torch.equal(before[i], after[i])]
    assert 1438 * 0.8 < len(moved) < 1438 * 0.95  # 8 of 9 shifts move an image
    centre = before[:, :, 1:-1, 1:-1]
    views = [after[:, :, 1 + y : 7 + y, 1 + x : 7 + x] for y in (-1, 0, 1) for x in (-1, 0, 1)]
    assert all(any(torch.equal(centre[i], view[i]) for view in views) for i in range(1438))
    same, mirror = ((flipped == each).flatten(1).all(1) for each in (before, before.flip(-1)))
    assert bool((same | mirror).all()) and 600 < int(same.sum()) < 850
    assert not torch.equal(next(drawn)[0].mean(0), after.mean(0))


def test_held_out_images_are_all_there_once_and_filled_up(digits: ImageData) -> None:
    rows = list(HeldOutImages(digits, 50))
    labels = torch.cat([row[1] for row in rows])
    assert len(rows) == 8 and int((labels != -100).sum()) == 359
    images = torch.cat([row[0] for row in rows])
    assert abs(float(images.mean())) < 0.1 and 0.8 < float(images.std()) < 1.2
    assert HeldOutImages(digits, 50, samples=100).describe() == "100 of 359 held-out images"


@pytest.mark.parametrize(
    ("source", "size", "fraction", "said"),
    [
        ("nowhere", 8, 0.1, "--data nowhere is no folder"),
        ("digits", 0, 0.1, "--image-size is 0"),
        ("digits", 8, 0.9, "--held-out-fraction is 0.9"),
    ],
)
def test_what_can_not_be_read_is_refused(source: str, size: int, fraction: float, said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_images(source, size, 1, fraction)
