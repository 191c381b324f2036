"""Data sets that the datasets library finds, on the Hugging Face hub or in a local folder, streamed."""

import json
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from ibp_deepspeed.errors import DataError, first_line


class HubRows:
    """The rows of a split of a data set, as dictionaries of some of its columns.

    They are streamed: nothing is downloaded but what is read, so the first rows of a large set come at once. What the
    first pass has read is kept in a file without a name, which later passes read instead: data are prepared in several
    passes, and have to be the same in each.

    Args:
        name: of the data set, or a local folder of its files.
        config: of the set; None: its default.
        split: "train", "validation", …, or a part such as "train[:1000]" of a local set.
        columns: that are read, those of them that the set has.
        keep_in: folder of the file.

    Raises:
        DataError: it can't be loaded or, in reading, streamed.
    """

    def __init__(
        self, name: str, config: str | None, split: str, columns: Collection[str], keep_in: Path | None = None
    ) -> None:
        self._name, self._config, self._split = name, config, split
        self._columns, self._keep_in = columns, keep_in
        self._kept: TextIO | None = None
        self._rows = self._load()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._kept is not None:
            self._kept.seek(0)
            yield from map(json.loads, self._kept)
            return
        if self._keep_in is not None:
            self._keep_in.mkdir(parents=True, exist_ok=True)
        self._kept = tempfile.TemporaryFile("w+", encoding="utf-8", dir=self._keep_in)  # noqa: SIM115, for all passes
        for row in self._streamed():
            self._kept.write(json.dumps(row) + "\n")
            yield row

    def _load(self) -> Any:
        import datasets  # slow to import, and only this source needs it

        try:
            return datasets.load_dataset(self._name, self._config, split=self._split, streaming=True)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise self._failed(error) from error

    def _streamed(self) -> Iterator[dict[str, Any]]:
        import datasets

        rows = iter(self._rows)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
                raise self._failed(error) from error
            yield {name: value for name, value in row.items() if name in self._columns} or _names_only(row)

    def _failed(self, error: Exception) -> DataError:
        return DataError(
            f"the data set {self._name} (config {self._config}, split {self._split}) could not be loaded "
            f"({first_line(error)}): check its name as NAME:CONFIG, --split and the network, or give local data with "
            "--input"
        )


def _names_only(row: dict[str, Any]) -> dict[str, Any]:
    """Of a row without any of the columns, for a message about it."""
    return dict.fromkeys(row)
