"""Text sources: a corpus is a description and documents in a fixed order, read again at will."""

import hashlib
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ibp_deepspeed.data.hub import HubRows
from ibp_deepspeed.data.records import RECORD_SUFFIXES, file_records, find_files, lines, sorted_files
from ibp_deepspeed.data.token_file import SplitName
from ibp_deepspeed.errors import DataError

END_OF_TEXT = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
# Not part of what the standard library does: third-party packages, tests, and byte-code caches.
_SKIPPED_STDLIB_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
# Tables that programs wrote (codecs of encodings, help texts of pydoc_data), which look like no other module.
_GENERATED_FOLDERS = frozenset({"encodings", "pydoc_data"})
_GENERATED_FILES = frozenset({"html/entities.py", "re/_casefix.py", "stringprep.py"})
# Else a few long modules would decide what the held-out part, about thirty modules, looks like.
_MODULE_CHARACTERS = 20_000

Document = TypeVar("Document")


@dataclass(frozen=True)
class Corpus(Generic[Document]):
    """Documents of one source; every iteration reads the source again and yields the same documents.

    A document is a string, or an object whose str() is its content.

    Empty documents (white space only) are left out. The corpus ends before the document that would exceed
    `max_documents` (a count) or `max_bytes` (UTF-8 bytes of all documents together).

    Iterating raises DataError when the source cannot be read as text.
    """

    description: str
    read: Callable[[], Iterator[Document]]
    max_documents: int | None = None
    max_bytes: int | None = None

    def __iter__(self) -> Iterator[Document]:
        documents = total_bytes = 0
        for document in self.read():
            text = str(document)
            if not text.strip():
                continue
            documents += 1
            total_bytes += len(_utf8(text, self.description))
            if self.max_documents is not None and documents > self.max_documents:
                return
            if self.max_bytes is not None and total_bytes > self.max_bytes:
                return
            yield document


@dataclass(frozen=True)
class DocumentSplit:
    """Says for each document on which side it lies: held out if its seeded hash is below `threshold`.

    The hash is of the content, so copies of a document are always on the same side. `documents` counts all.
    """

    seed: int
    threshold: int
    documents: int

    @classmethod
    def of(cls, texts: Iterable[object], held_out_fraction: float, seed: int) -> "DocumentSplit":
        """Reads all documents once; moves the threshold where needed so that each side has a document.

        Raises DataError when the fraction is not between 0 and 1, or there are not two different documents.
        """
        if not 0.0 < held_out_fraction < 1.0:
            raise DataError(
                f"the held-out fraction is {held_out_fraction}, it must lie between 0 and 1: give a value such as 0.05"
            )
        documents, lowest, highest = 0, 1 << 64, -1
        for text in texts:
            value = _hash(str(text), seed)
            documents, lowest, highest = documents + 1, min(lowest, value), max(highest, value)
        if lowest >= highest:
            raise DataError(
                f"the source has {documents} documents (copies of one text count once), a split by document "
                "needs 2 different ones: give more text, or raise --max-documents or --max-bytes"
            )
        wanted = int(held_out_fraction * (1 << 64))
        return cls(seed=seed, threshold=min(max(wanted, lowest + 1), highest), documents=documents)

    def side(self, text: object) -> SplitName:
        return "heldout" if _hash(str(text), self.seed) < self.threshold else "train"


def standard_library(
    *, whole: bool = False, max_documents: int | None = None, max_bytes: int | None = None
) -> Corpus[str]:
    """The sources (*.py) of the running Python's standard library without its tests, a document a module.

    Of each module the first 20,000 characters, cut after a whole line; generated tables are left out. With `whole`
    modules are as long as they are, and the tables are there.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = _SKIPPED_STDLIB_FOLDERS if whole else _SKIPPED_STDLIB_FOLDERS | _GENERATED_FOLDERS
    files = sorted_files(root, (".py",), skip=skipped)
    # _sysconfigdata*.py is written when Python is built and differs from machine to machine.
    files = [path for path in files if not path.name.startswith("_sysconfigdata")]
    if not whole:
        files = [path for path in files if path.relative_to(root).as_posix() not in _GENERATED_FILES]

    def read() -> Iterator[str]:
        texts = map(_read_text, files)
        return texts if whole else (_beginning(text, _MODULE_CHARACTERS) for text in texts)

    name = f"Python {platform.python_version()} standard library"
    if not whole:
        name += f", the first {_MODULE_CHARACTERS:,} characters of each module, without tests and generated tables"
    return Corpus(name, read, max_documents, max_bytes)


def open_corpus(
    path: str | Path,
    *,
    text_field: str = "text",
    max_documents: int | None = None,
    max_bytes: int | None = None,
) -> Corpus[str]:
    """Documents of a .jsonl, .parquet or text file, or of all such files in a folder (sorted by path).

    A record is a document. A text file is divided at lines that hold only `<|endoftext|>`; without such a
    line, a text file of a folder is one document, and one given by itself is divided at blank lines.

    Raises DataError when the path does not exist or holds no file of a known type.
    """
    path = Path(path)
    files = find_files(path, TEXT_SUFFIXES + RECORD_SUFFIXES)

    def read() -> Iterator[str]:
        for file in files:
            if file.suffix in RECORD_SUFFIXES:
                for where, record in file_records(file, text_field):
                    yield _text_of(record, where, text_field)
            else:
                yield from _text_documents(file, alone=path.is_file())

    # The name only: the same text prepared from another place must give the same manifest.
    return Corpus(path.resolve().name, read, max_documents, max_bytes)


def hub_corpus(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    max_documents: int | None = None,
    max_bytes: int | None = None,
    keep_in: Path | None = None,
) -> Corpus[str]:
    """A split of a data set that `datasets.load_dataset` finds, streamed, a document a row; see HubRows.

    Raises DataError when the data set cannot be loaded; in reading, when it has no such field.
    """
    rows = HubRows(name, config, split, (text_field,), keep_in)

    def read() -> Iterator[str]:
        for number, row in enumerate(rows):
            yield _text_of(row, f"row {number} of {name}", text_field)

    return Corpus(hub_name(name, config, split), read, max_documents, max_bytes)


def hub_name(name: str, config: str | None, split: str) -> str:
    """A data set in words."""
    named = name if config is None else f"{name} ({config})"
    return named if split == "train" else f"{named}, split {split}"


def _read_text(path: Path) -> str:
    return "".join(lines(path))


def _beginning(text: str, characters: int) -> str:
    """Whole lines of at most so many characters, or all of a text that is not longer."""
    return text if len(text) <= characters else text[: text.rfind("\n", 0, characters) + 1]


def _text_documents(path: Path, *, alone: bool) -> Iterator[str]:
    marked = any(line.strip() == END_OF_TEXT for line in lines(path))
    if not marked and not alone:
        yield _read_text(path)
        return
    separator = END_OF_TEXT if marked else ""
    document: list[str] = []
    for line in lines(path):
        if line.strip() == separator:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def _text_of(record: dict[str, Any], where: str, field: str) -> str:
    if field not in record:
        raise _no_such_field(where, field, list(record))
    value = record[field]
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
