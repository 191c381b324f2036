"""Reading sources as they are: lines of text files, and rows of .jsonl and .parquet files as dictionaries.

Each row comes with where it is, for error messages: a file and the number of its line or row.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from ibp_deepspeed.errors import DataError, first_line
from ibp_deepspeed.json_text import parsed

RECORD_SUFFIXES = (".jsonl", ".parquet")

LONGEST_LINE = 1 << 28  # characters: a file without an end of line must not fill the memory
BATCH_BYTES = 1 << 24  # of decompressed rows at once

Record = tuple[str, dict[str, Any]]


def find_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file, or all such files of the folder in a fixed order; DataError when there is none."""
    known = ", ".join(suffixes)
    if not path.exists():
        raise DataError(f"{path} does not exist: give a folder or a file ({known})")
    files = sorted_files(path, suffixes) if path.is_dir() else [path] * (path.suffix in suffixes)
    if not files:
        raise DataError(f"{path} is or holds no file of a known type: give a folder or a file ({known})")
    return files


def sorted_files(root: Path, suffixes: tuple[str, ...], skip: frozenset[str] = frozenset()) -> list[Path]:
    """Files under root in an order that depends on their relative names only; hidden ones are left out."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        # Changed in place, so that the walk does not enter the folders left out.
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    found = [path for path in found if path.suffix in suffixes and path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def lines(path: Path) -> Iterator[str]:
    """Lines with their ends as they are in the file (newline="" translates nothing).

    Raises DataError when it is not UTF-8 text, or has a line of more than LONGEST_LINE characters.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while line := file.readline(LONGEST_LINE + 1):
                if len(line) > LONGEST_LINE:
                    raise DataError(
                        f"{path} has a line of more than {LONGEST_LINE:,} characters, which is read at once: divide it"
                    )
                yield line
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}): convert it, or leave it out") from error


def file_records(path: Path, field: str | None = None) -> Iterator[Record]:
    """The rows of a .jsonl or .parquet file; of the latter only `field` is read, if it is given and there."""
    return _parquet_records(path, field) if path.suffix == ".parquet" else _jsonl_records(path)


def _jsonl_records(path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines(path), start=1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            record = parsed(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error}): each line must be one JSON object") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} is not a JSON object: each line must be an object with named fields")
        yield where, record


def _parquet_records(path: Path, field: str | None) -> Iterator[Record]:
    try:
        for number, record in enumerate(_rows(path, field), start=1):
            yield f"{path} row {number}", record
    except Exception as error:  # pyarrow raises many kinds: also for a value that Python has no type for
        raise DataError(f"{path} cannot be read as Parquet ({first_line(error)}): give a complete file") from error


def _rows(path: Path, field: str | None) -> Iterator[dict[str, Any]]:
    """One after the other, so that a value that is repeated a million times is in memory once, and one row whole."""
    with pyarrow.parquet.ParquetFile(path) as file:
        texts = [file.schema.column(i).path for i in range(len(file.schema)) if _is_text(file.schema.column(i))]
        columns = [field] if field in file.schema_arrow.names else None
    with pyarrow.parquet.ParquetFile(path, read_dictionary=texts, buffer_size=1 << 20) as file:
        for group in range(file.num_row_groups):
            rows = _rows_at_once(file.metadata.row_group(group))
            for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
                for values in zip(*batch.columns, strict=True):
                    yield dict(zip(batch.schema.names, (value.as_py() for value in values), strict=True))


def _is_text(column: Any) -> bool:
    return column.physical_type == "BYTE_ARRAY"


def _rows_at_once(group: Any) -> int:
    """Of a row group, so that they have BATCH_BYTES on the average, decompressed."""
    return max(1, min(1024, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))
