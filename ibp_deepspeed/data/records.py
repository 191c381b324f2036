"""Reading sources as they are: lines of text files, and rows of .jsonl, .parquet and hub data sets as dictionaries.

Each row comes with where it is, for error messages: a file and the number of its line or row, or a data set's.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ibp_deepspeed.errors import DataError, first_line

RECORD_SUFFIXES = (".jsonl", ".parquet")

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
    """Lines with their ends as they are in the file (newline="" translates nothing)."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}): convert it, or leave it out") from error


def file_records(path: Path, field: str | None = None) -> Iterator[Record]:
    """The rows of a .jsonl or .parquet file; of the latter only `field` is read, if it is given and there."""
    return _parquet_records(path, field) if path.suffix == ".parquet" else _jsonl_records(path)


def hub_records(name: str, config: str | None) -> Any:
    """The "train" split of a data set that `datasets.load_dataset` finds; DataError when it cannot be loaded."""
    import datasets  # slow to import, and only this source needs it

    try:
        return datasets.load_dataset(name, config, split="train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"the data set {name} (config {config}) could not be loaded ({first_line(error)}): "
            "check its name, --dataset-config and the network, or give local data with --input"
        ) from error


def _jsonl_records(path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines(path), start=1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON ({error.msg}): each line must be one JSON object") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} is not a JSON object: each line must be an object with named fields")
        yield where, record


def _parquet_records(path: Path, field: str | None) -> Iterator[Record]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [field] if field in file.schema_arrow.names else None
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", record
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet ({first_line(error)}): give a complete file") from error
