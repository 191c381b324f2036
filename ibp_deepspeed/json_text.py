"""JSON that somebody else may have written: of a bounded size and depth, and all that is wrong with it one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 64 * 2**20
"""Of a file that is read at once; the list of a checkpoint of a thousand processes and layers has a hundredth."""
DEEPEST = 64
"""Lists and objects within each other; Python itself gives up at about a thousand, where it stands in the stack."""


def small_text(path: Path) -> str:
    """All of a small text file.

    Raises:
        OSError: it can't be read.
        ValueError: it is a pipe or a device, too large or no UTF-8; in words.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # opening it could wait for ever
        raise ValueError("it is neither a file nor a folder")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text ({error.reason})") from None


def parsed(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested deeper than ``DEEPEST``, or has a number with more digits than Python
            reads; in words.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f" in line {error.lineno}" if "\n" in text.strip() else ""
        raise ValueError(f"{error.msg}{where}") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from None
    except ValueError:  # Python's own limit of 4,300 digits
        raise ValueError("a number in it has thousands of digits") from None
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [item for each in level for item in _items(each)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def _items(value: Any) -> list[Any]:
    found = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [item for item in found if isinstance(item, dict | list)]
