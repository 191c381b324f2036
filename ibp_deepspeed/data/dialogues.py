"""Rows to fine-tune on: a prompt and its response, or messages of several roles."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibp_deepspeed.data.corpus import Corpus, hub_name
from ibp_deepspeed.data.hub import HubRows
from ibp_deepspeed.data.records import RECORD_SUFFIXES, file_records, find_files
from ibp_deepspeed.errors import DataError

ASSISTANT = "assistant"
_FIELDS = ("prompt", "response", "completion", "messages")


@dataclass(frozen=True)
class Dialogue:
    """One row; str() is its content, the same for copies of a row.

    Attributes:
        where: file and number, for messages.
        messages: each with at least "role" and "content", both strings; one of an assistant is not blank.
        is_pair: the row was given as a prompt and its response, now one message of a user and one of an assistant.
    """

    where: str
    messages: list[dict[str, Any]]
    is_pair: bool

    @classmethod
    def of(cls, where: str, record: dict[str, Any]) -> "Dialogue":
        """Makes one of {"prompt", "response" or "completion"} or {"messages"}; other fields are not read.

        Raises DataError when these fields are missing or of another type, or there is no response.
        """
        messages = record.get("messages")
        is_pair = messages is None
        if is_pair:
            messages = _pair(where, record)
        elif not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise DataError(f'{where} has "messages" that are not a list of objects with "role" and "content"')
        for message in messages:
            for name in ("role", "content"):
                _check_text(where, name, message.get(name))
        if not any(message["role"] == ASSISTANT and message["content"].strip() for message in messages):
            raise DataError(
                f'{where} has no response: give text in "response", or in the "content" of a message of the role '
                f'"{ASSISTANT}", or leave the row out'
            )
        return cls(where, messages, is_pair)

    def __str__(self) -> str:
        return json.dumps(self.messages, ensure_ascii=False, sort_keys=True, default=str)


def open_dialogues(
    path: str | Path, *, max_documents: int | None = None, max_bytes: int | None = None
) -> Corpus[Dialogue]:
    """The rows of a .jsonl or .parquet file, or of all such files in a folder (sorted by path).

    Raises DataError when there is no such file; reading it, for rows that are not as `Dialogue.of` needs them.
    """
    path = Path(path)
    files = find_files(path, RECORD_SUFFIXES)

    def read() -> Iterator[Dialogue]:
        for file in files:
            for where, record in file_records(file):
                yield Dialogue.of(where, record)

    return Corpus(path.resolve().name, read, max_documents, max_bytes)


def hub_dialogues(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    max_documents: int | None = None,
    max_bytes: int | None = None,
    keep_in: Path | None = None,
) -> Corpus[Dialogue]:
    """The rows of a split of a data set that `datasets.load_dataset` finds, see HubRows; errors as open_dialogues."""
    rows = HubRows(name, config, split, _FIELDS, keep_in)

    def read() -> Iterator[Dialogue]:
        for number, record in enumerate(rows):
            yield Dialogue.of(f"row {number} of {name}", record)

    return Corpus(hub_name(name, config, split), read, max_documents, max_bytes)


def _pair(where: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    # A table has all columns in all rows: None is an absent field.
    present = {name: value for name, value in record.items() if value is not None}
    prompt, response = present.get("prompt"), present.get("response", present.get("completion"))
    if prompt is None or response is None:
        raise DataError(
            f'{where} has the fields {", ".join(present) or "none"}: a row needs "prompt" and "response", or "messages"'
        )
    _check_text(where, "prompt", prompt)
    _check_text(where, "response", response)
    return [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": response}]


def _check_text(where: str, name: str, value: object) -> None:
    if not isinstance(value, str):
        raise DataError(f'{where} has a {type(value).__name__} as "{name}", text is expected: make it a string')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise DataError(f'{where} has a "{name}" that is not valid Unicode ({error.reason}): mend it') from error
