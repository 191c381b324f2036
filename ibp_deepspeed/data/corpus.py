"""Text sources: a corpus is a description and documents (strings) in a fixed order, read again at will."""

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from ibp_deepspeed.data.token_file import DataError, SplitName

END_OF_TEXT = "<|endoftext|>"
RECORD_SUFFIXES = (".jsonl", ".parquet")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
# Not part of what the standard library does: third-party packages, tests, and byte-code caches.
_SKIPPED_STDLIB_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Documents of one source; every iteration reads the source again and yields the same documents.

    Empty documents (white space only) are left out. The corpus ends before the document that would exceed
    `max_documents` (a count) or `max_bytes` (UTF-8 bytes of all documents together).

    Iterating raises DataError when the source cannot be read as text.
    """

    description: str
    read: Callable[[], Iterator[str]]
    max_documents: int | None = None
    max_bytes: int | None = None

    def __iter__(self) -> Iterator[str]:
        documents = total_bytes = 0
        for text in self.read():
            if not text.strip():
                continue
            documents += 1
            total_bytes += len(_utf8(text, self.description))
            if self.max_documents is not None and documents > self.max_documents:
                return
            if self.max_bytes is not None and total_bytes > self.max_bytes:
                return
            yield text


@dataclass(frozen=True)
class DocumentSplit:
    """Says for each document on which side it lies: held out if its seeded hash is below `threshold`.

    The hash is of the content, so copies of a document are always on the same side. `documents` counts all.
    """

    seed: int
    threshold: int
    documents: int

    @classmethod
    def of(cls, texts: Iterable[str], held_out_fraction: float, seed: int) -> "DocumentSplit":
        """Reads all documents once; moves the threshold where needed so that each side has a document.

        Raises DataError when the fraction is not between 0 and 1, or there are not two different documents.
        """
        if not 0.0 < held_out_fraction < 1.0:
            raise DataError(
                f"the held-out fraction is {held_out_fraction}, it must lie between 0 and 1: give a value such as 0.05"
            )
        documents, lowest, highest = 0, 1 << 64, -1
        for text in texts:
            value = _hash(text, seed)
            documents, lowest, highest = documents + 1, min(lowest, value), max(highest, value)
        if lowest >= highest:
            raise DataError(
                f"the source has {documents} documents (copies of one text count once), a split by document "
                "needs 2 different ones: give more text, or raise --max-documents or --max-bytes"
            )
        wanted = int(held_out_fraction * (1 << 64))
        return cls(seed=seed, threshold=min(max(wanted, lowest + 1), highest), documents=documents)

    def side(self, text: str) -> SplitName:
        return "heldout" if _hash(text, self.seed) < self.threshold else "train"


def standard_library(*, max_documents: int | None = None, max_bytes: int | None = None) -> Corpus:
    """The sources (*.py) of the running Python's standard library without its tests, a document a file."""
    files = _sorted_files(Path(sysconfig.get_paths()["stdlib"]), (".py",), skip=_SKIPPED_STDLIB_FOLDERS)
    # _sysconfigdata*.py is written when Python is built and differs from machine to machine.
    files = [path for path in files if not path.name.startswith("_sysconfigdata")]

    def read() -> Iterator[str]:
        return map(_read_text, files)

    name = f"Python {platform.python_version()} standard library"
    return Corpus(name, read, max_documents, max_bytes)


def open_corpus(
    path: str | Path,
    *,
    text_field: str = "text",
    max_documents: int | None = None,
    max_bytes: int | None = None,
) -> Corpus:
    """Documents of a .jsonl, .parquet or text file, or of all such files in a folder (sorted by path).

    A record is a document. A text file is divided at lines that hold only `<|endoftext|>`; without such a
    line, a text file of a folder is one document, and one given by itself is divided at blank lines.

    Raises DataError when the path does not exist or holds no file of a known type.
    """
    path = Path(path)
    known = ", ".join(TEXT_SUFFIXES + RECORD_SUFFIXES)
    if not path.exists():
        raise DataError(f"{path} does not exist: give a folder or a file ({known})")
    if path.is_file():
        files = [path] if path.suffix in TEXT_SUFFIXES + RECORD_SUFFIXES else []
    else:
        files = _sorted_files(path, TEXT_SUFFIXES + RECORD_SUFFIXES)
    if not files:
        raise DataError(f"{path} is or holds no file of a known type: give a folder or a file ({known})")

    def read() -> Iterator[str]:
        for file in files:
            if file.suffix == ".jsonl":
                yield from _jsonl_documents(file, text_field)
            elif file.suffix == ".parquet":
                yield from _parquet_documents(file, text_field)
            else:
                yield from _text_documents(file, alone=path.is_file())

    # The name only: the same text prepared from another place must give the same manifest.
    return Corpus(path.resolve().name, read, max_documents, max_bytes)


def hub_corpus(
    name: str,
    *,
    config: str | None = None,
    text_field: str = "text",
    max_documents: int | None = None,
    max_bytes: int | None = None,
) -> Corpus:
    """The "train" split of a data set that `datasets.load_dataset` finds, a document a row.

    Raises DataError when the data set cannot be loaded or has no such field.
    """
    import datasets  # slow to import, and only this source needs it

    try:
        rows = datasets.load_dataset(name, config, split="train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"the data set {name} (config {config}) could not be loaded ({_first_line(error)}): "
            "check its name, --dataset-config and the network, or give local text with --input"
        ) from error
    if text_field not in rows.column_names:
        raise _no_such_field(f"the data set {name}", text_field, rows.column_names)

    def read() -> Iterator[str]:
        for number, row in enumerate(rows.select_columns([text_field])):
            yield _as_text(row[text_field], f"row {number} of {name}", text_field)

    return Corpus(name if config is None else f"{name} ({config})", read, max_documents, max_bytes)


def _sorted_files(root: Path, suffixes: tuple[str, ...], skip: frozenset[str] = frozenset()) -> list[Path]:
    """Files under root in an order that depends on their relative names only; hidden ones are left out."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        # Changed in place, so that the walk does not enter the folders left out.
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    found = [path for path in found if path.suffix in suffixes and path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read_text(path: Path) -> str:
    return "".join(_lines(path))


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends as they are in the file (newline="" translates nothing)."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}): convert it, or leave it out") from error


def _text_documents(path: Path, *, alone: bool) -> Iterator[str]:
    marked = any(line.strip() == END_OF_TEXT for line in _lines(path))
    if not marked and not alone:
        yield _read_text(path)
        return
    separator = END_OF_TEXT if marked else ""
    document: list[str] = []
    for line in _lines(path):
        if line.strip() == separator:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def _jsonl_documents(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON ({error.msg}): each line must be one JSON object") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} is not a JSON object: each line must be an object with a text field")
        if field not in record:
            raise _no_such_field(where, field, list(record))
        yield _as_text(record[field], where, field)


def _parquet_documents(path: Path, field: str) -> Iterator[str]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _no_such_field(str(path), field, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _as_text(value, str(path), field)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet ({_first_line(error)}): give a whole file") from error


def _as_text(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f'{where} has a {type(value).__name__} in the field "{field}", text is expected: '
            "name the field of the text with --text-field"
        )
    return value


def _no_such_field(where: str, field: str, present: list[str]) -> DataError:
    return DataError(
        f'{where} has no field "{field}" (it has {", ".join(present) or "none"}): '
        "name the field of the text with --text-field"
    )


def _utf8(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise DataError(f"{where} has a document that is not valid Unicode ({error.reason}): mend it") from error


def _hash(text: str, seed: int) -> int:
    """64 bits of the document's content and the seed, spread evenly."""
    digest = hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
