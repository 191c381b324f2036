"""Prepared data on disk: a folder with packed tokens (train.bin, heldout.bin), a tokenizer and a manifest.

A text has beside each token file one of the bounds of its documents (train.bounds.bin): where each begins, and where
the last one ends. Dialogues have one of marks instead (train.marks.bin): a byte a token that says whether the token
counts in the loss, and whether a row begins there. Folders that earlier versions wrote have no bounds.
"""

import hashlib
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ibp_deepspeed.atomic_files import replace_folder
from ibp_deepspeed.data.encoding import Encoded, Row, encoded
from ibp_deepspeed.errors import DataError, first_line
from ibp_deepspeed.folders import check_entries, relative_name
from ibp_deepspeed.json_text import small_text

SplitName = Literal["train", "heldout"]
Name = Annotated[str, AfterValidator(relative_name)]  # of a file in the prepared folder
TokenArray = npt.NDArray[np.unsignedinteger[Any]]
MarkArray = npt.NDArray[np.uint8]
BoundArray = npt.NDArray[np.uint64]

MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
# Bits of a mark: the token counts in the loss; it is the first one of its row.
COUNTS, FIRST = 1, 2
_BOUND = np.dtype("<u8")
_AGAIN = "run scripts/prepare_data.py again with --overwrite"


class Encoder(Protocol):
    """What makes rows of documents; `vocabulary_size` is its highest token id plus one."""

    vocabulary_size: int
    eos_id: int

    def rows(self, documents: list[Any]) -> list[Row]: ...

    def save(self, folder: Path) -> None: ...


class MarksRecord(BaseModel):
    """What a manifest says of the marks of one token file, a byte a token; `longest_row` is in tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Name
    counted_tokens: PositiveInt
    longest_row: PositiveInt
    sha256: str


class BoundsRecord(BaseModel):
    """What a manifest says of the bounds of one token file: 8 bytes a document, and 8 for the end of the last."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Name
    sha256: str


class SplitRecord(BaseModel):
    """What a manifest says of one token file: a text has `bounds` (from an earlier version none), dialogues `marks`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Name
    documents: PositiveInt
    tokens: PositiveInt
    max_token_id: NonNegativeInt
    sha256: str
    marks: MarksRecord | None = None
    bounds: BoundsRecord | None = None


class Manifest(BaseModel):
    """What a prepared folder holds; `vocabulary_size` is the highest token id of the tokenizer plus one.

    `unigram_entropy_nats` is in nats per held-out token, of those that count in the loss, under the frequencies of
    those in the train split; tokens are little-endian integers of type `dtype`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    source: str
    seed: int
    held_out_fraction: float
    dtype: Literal["uint16", "uint32"]
    vocabulary_size: PositiveInt
    eos_id: NonNegativeInt
    tokenizer_file: Name
    unigram_entropy_nats: float
    train: SplitRecord
    heldout: SplitRecord

    @model_validator(mode="after")
    def _fits_its_dtype(self) -> "Manifest":
        bound = 1 << 8 * self.numpy_dtype.itemsize
        if self.vocabulary_size > bound or max(self.train.max_token_id, self.heldout.max_token_id) >= bound:
            raise ValueError(f"{self.dtype} holds token ids below {bound} only")
        return self

    @property
    def numpy_dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """Of the token files."""
        return _little_endian(self.dtype)


@dataclass(frozen=True)
class TokenFile:
    """The packed tokens of one split: documents one after the other.

    A text is closed by the manifest's eos_id. Dialogues end as their chat template says, and have `marks`.
    With `bounds` document d is tokens[bounds[d] : bounds[d+1]].
    """

    path: Path
    split: SplitName
    tokens: TokenArray  # [number of tokens]
    manifest: Manifest
    marks: MarkArray | None = None  # [number of tokens], bits COUNTS and FIRST
    bounds: BoundArray | None = None  # [number of documents + 1], rising from 0 to the number of tokens

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Raises DataError when the data can hold a token id that a model of `model_vocab_size` ids lacks."""
        manifest = self.manifest
        highest = max(manifest.train.max_token_id, manifest.heldout.max_token_id, manifest.eos_id)
        needed = max(manifest.vocabulary_size, highest + 1)
        if needed > model_vocab_size:
            raise DataError(
                f"{self.path} has token ids up to {highest} from a vocabulary of "
                f"{self.manifest.vocabulary_size}, the model's vocabulary size is {model_vocab_size}: "
                f"set the model's vocabulary size to {needed} or more"
            )

    def counts(self, vocabulary_size: int, *, at_most: int = 2**26) -> npt.NDArray[np.int64]:
        """How often each token occurs, [vocabulary_size], in `at_most` tokens spread evenly over the split."""
        parts = max(1, min(64, at_most // 4096))
        length = at_most // parts
        starts = np.linspace(0, max(0, len(self.tokens) - length), parts).astype(np.int64)
        chunks = [self.tokens] if len(self.tokens) <= at_most else [self.tokens[s : s + length] for s in starts]
        return sum((np.bincount(chunk, minlength=vocabulary_size) for chunk in chunks), np.zeros(1, dtype=np.int64))


def open_tokens(folder: str | Path, split: SplitName, *, verify: bool = True) -> TokenFile:
    """Maps the tokens of the split "train" or "heldout" of a folder that scripts/prepare_data.py wrote.

    The file's size is always compared with the manifest; `verify=True` also reads all of it for the
    checksum and the highest token id, which only one process of a job needs to do.

    Raises DataError for a missing folder, manifest or file, a broken manifest, an unknown split, a size, a
    checksum, a token id or a bound that differs, or a link that leads out of the folder.
    """
    folder = Path(folder)
    if split not in get_args(SplitName):
        raise DataError(f'{folder} has no split "{split}": use {" or ".join(get_args(SplitName))}')
    manifest = read_manifest(folder)
    record: SplitRecord = getattr(manifest, split)
    path, dtype = folder / record.file, manifest.numpy_dtype
    _check_file(path, record.tokens * dtype.itemsize, record.sha256, verify=verify)
    marks: MarkArray | None = None
    if record.marks is not None:
        marks_path = folder / record.marks.file
        _check_file(marks_path, record.tokens, record.marks.sha256, verify=verify)
        marks = np.memmap(marks_path, dtype=np.uint8, mode="r")
    bounds = None if record.bounds is None else _open_bounds(folder / record.bounds.file, record, verify=verify)
    tokens = np.memmap(path, dtype=dtype, mode="r")
    if verify and (highest := int(tokens.max())) > record.max_token_id:
        raise DataError(f"{path} has the token id {highest}, its manifest says at most {record.max_token_id}: {_AGAIN}")
    return TokenFile(path=path, split=split, tokens=tokens, manifest=manifest, marks=marks, bounds=bounds)


def _open_bounds(path: Path, record: SplitRecord, *, verify: bool) -> BoundArray:
    """Maps them; windows are read where they say, so they have to lie in the file of tokens even if not verified."""
    assert record.bounds is not None
    _check_file(path, (record.documents + 1) * _BOUND.itemsize, record.bounds.sha256, verify=verify)
    bounds: BoundArray = np.memmap(path, dtype=_BOUND, mode="r")
    if bounds[0] != 0 or bounds[-1] != record.tokens or (bounds[1:] <= bounds[:-1]).any():
        raise DataError(
            f"{path} does not rise from 0 to {record.tokens}, the number of tokens, as bounds of documents do: {_AGAIN}"
        )
    return bounds


def _check_file(path: Path, expected: int, sha256: str, *, verify: bool) -> None:
    """Raises DataError when a file has not the expected bytes, or, if `verify`, not the checksum."""
    if not path.is_file():
        raise DataError(f"{path} does not exist, though the manifest of its folder names it: {_AGAIN}")
    size = path.stat().st_size
    if size != expected:
        fault = "it is truncated" if size < expected else "something was added to it"
        raise DataError(f"{path} has {size} bytes, its manifest says {expected}: {fault}; {_AGAIN}")
    if verify:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            raise DataError(
                f"{path} has the sha256 {digest}, its manifest says {sha256}: its content changed; {_AGAIN}"
            )


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a prepared folder; raises DataError when it is missing or broken."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: make it with scripts/prepare_data.py --out {folder}")
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST}: name a folder that scripts/prepare_data.py made, or make one")
    try:
        check_entries(folder)
        return Manifest.model_validate_json(small_text(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path} is not a manifest of this version ({place}: {first['msg']}): {_AGAIN}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} can't be read: {first_line(error)}") from error


def check_target(folder: str | Path, *, overwrite: bool) -> None:
    """Raises DataError when `folder` may not be written.

    Prepared data are replaced with `overwrite` only; any other file or non-empty folder never is.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} exists and is not a folder of prepared data: choose another --out")
    if not overwrite:
        raise DataError(f"{folder} holds prepared data already: choose another --out, or give --overwrite")


def write_tokens(
    folder: str | Path,
    documents: Iterable[tuple[SplitName, Any]],
    tokenizer: Encoder,
    *,
    source: str,
    seed: int,
    held_out_fraction: float,
    overwrite: bool = False,
    workers: int = 1,
) -> Manifest:
    """Encodes the documents (what the tokenizer takes), each into the files of its split, and writes the folder.

    Everything goes to a hidden folder beside the target first, which takes the target's name only when all of
    it is on the disk. `source`, `seed` and `held_out_fraction` are recorded in the manifest as given. With more
    `workers` so many processes encode what is long; what is written is the same, byte for byte.

    Raises DataError when the target may not be written (see check_target) or a split gets no document.
    """
    folder = Path(folder)
    check_target(folder, overwrite=overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocabulary_size <= 1 << 16 else "uint32"
        train, heldout = (_SplitWriter(partial, split, tokenizer.vocabulary_size) for split in get_args(SplitName))
        writers: dict[SplitName, _SplitWriter] = {"train": train, "heldout": heldout}
        for part in encoded(documents, tokenizer, _little_endian(dtype), workers):
            writers[part.split].append(part)
        tokenizer.save(partial / TOKENIZER_FOLDER)
        manifest = Manifest(
            source=source,
            seed=seed,
            held_out_fraction=held_out_fraction,
            dtype=dtype,
            vocabulary_size=tokenizer.vocabulary_size,
            eos_id=tokenizer.eos_id,
            tokenizer_file=f"{TOKENIZER_FOLDER}/tokenizer.json",
            train=train.record(),
            heldout=heldout.record(),
            unigram_entropy_nats=unigram_entropy(train.loss_counts, heldout.loss_counts),
        )
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
        replace_folder(partial, folder, partial.with_name(partial.name + "-old"))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def unigram_entropy(train_counts: npt.NDArray[np.int64], heldout_counts: npt.NDArray[np.int64]) -> float:
    """Cross-entropy in nats per held-out token under the train split's frequencies, with one added to each.

    Both arrays are [vocabulary size]: how often each token occurs in the split.
    """
    log_probability = np.log(train_counts + 1.0) - np.log(train_counts.sum() + float(len(train_counts)))
    return float(-(heldout_counts * log_probability).sum() / heldout_counts.sum())


class _SplitWriter:
    """Streams the tokens and marks of one split to its files and keeps what the manifest says of them."""

    def __init__(self, folder: Path, split: SplitName, vocabulary_size: int) -> None:
        self.split = split
        self.loss_counts = np.zeros(vocabulary_size, dtype=np.int64)  # of the tokens that count
        self._tokens, self._marks = _GrowingFile(folder / f"{split}.bin"), _GrowingFile(folder / f"{split}.marks.bin")
        self._bounds = _GrowingFile(folder / f"{split}.bounds.bin")
        self._documents = self._longest = self._highest = 0

    def append(self, encoded: Encoded[SplitName]) -> None:
        tokens, lengths = encoded.tokens, encoded.lengths
        ends = np.cumsum(lengths)
        if encoded.counts is None:
            bounds = np.append([] if self._documents else [0], self._tokens.items + ends)
            self._bounds.append(bounds.astype(_BOUND))
        self._tokens.append(tokens)
        self._documents += len(lengths)
        self._longest = max(self._longest, int(lengths.max()))
        self._highest = max(self._highest, int(tokens.max()))
        if encoded.counts is not None:
            marks = encoded.counts * np.uint8(COUNTS)
            marks[ends - lengths] = FIRST  # a first token never counts, as there is nothing to predict it from
            self._marks.append(marks)
            tokens = tokens[marks & COUNTS != 0]
        self.loss_counts += np.bincount(tokens, minlength=len(self.loss_counts))

    def record(self) -> SplitRecord:
        if not self._documents:
            raise DataError(f'no document is in the split "{self.split}": each split needs at least one')
        return SplitRecord(
            file=self._tokens.path.name,
            documents=self._documents,
            tokens=self._tokens.items,
            max_token_id=self._highest,
            sha256=self._tokens.sha256.hexdigest(),
            marks=self._marks_record(),
            bounds=self._bounds_record(),
        )

    def _bounds_record(self) -> BoundsRecord | None:
        if not self._bounds.items:
            return None
        return BoundsRecord(file=self._bounds.path.name, sha256=self._bounds.sha256.hexdigest())

    def _marks_record(self) -> MarksRecord | None:
        if not self._marks.items:
            return None
        return MarksRecord(
            file=self._marks.path.name,
            counted_tokens=int(self.loss_counts.sum()),
            longest_row=self._longest,
            sha256=self._marks.sha256.hexdigest(),
        )


class _GrowingFile:
    """A file that arrays are appended to, the number of their items, and its checksum so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.items = 0
        self.sha256 = hashlib.sha256()

    def append(self, array: npt.NDArray[Any]) -> None:
        data = array.tobytes()
        with self.path.open("ab") as file:
            file.write(data)
        self.items += len(array)
        self.sha256.update(data)


def _little_endian(dtype: str) -> np.dtype[np.unsignedinteger[Any]]:
    return np.dtype(dtype).newbyteorder("<")
