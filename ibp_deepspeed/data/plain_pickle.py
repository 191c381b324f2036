"""Old data sets that are pickles, read without running them: numbers, texts, lists, dictionaries and plain arrays.

A pickle is a program. Its instructions are listed by Python's ``pickletools``, which executes none, and those that make
plain values are followed here. The one name that may be called is numpy's way to write an array.
"""

from __future__ import annotations

import pickletools
from typing import Any

import numpy as np

from ibp_deepspeed.errors import DataError

_ARRAY = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_NAMES = (*_ARRAY, "numpy ndarray", "numpy dtype", "_codecs encode")
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINSTRING", "BINSTRING", "BINUNICODE",
    "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "INT", "LONG",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KINDS = "uif"  # of numbers in arrays


class _Name(str):
    """Of a class or function that is not looked up."""


class _Array:
    """An array that waits for its contents."""

    value: np.ndarray[Any, Any] | None = None


class _Type:
    """A dtype by its name."""

    def __init__(self, name: Any) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else str(name)


def read_plain(content: bytes, name: str) -> Any:
    """The value that a pickle of plain values holds; its old byte strings are bytes.

    Args:
        content: the file's.
        name: for messages.

    Raises:
        DataError: it is no such pickle.
    """
    try:
        return _resolved(_Reader().run(content))
    except _Refused as refused:
        raise DataError(f"{name} is a pickle with {refused}, which plain data have not: it is not read") from None
    except Exception as error:  # whatever a damaged file makes pickletools, numpy or the stack say
        raise DataError(f"{name} is no pickle of plain data: {type(error).__name__}") from error


class _Refused(Exception):
    """In words: what is in the pickle."""


class _Reader:
    """A stack machine for the instructions of plain values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise _Refused("no end")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _VALUES:
            stack.append(argument.encode("latin1") if "STRING" in name else argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in _TUPLES:
            size = _TUPLES[name]
            stack.append(tuple(self.pop(size)))
        elif name == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        else:
            self.join(name, argument)

    def join(self, name: str, argument: Any) -> None:
        """Instructions that use what is on the stack."""
        stack = self.stack
        if name in ("APPEND", "APPENDS"):
            items = self.since_mark() if name == "APPENDS" else self.pop(1)
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.since_mark() if name == "SETITEMS" else self.pop(2)
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_known(" ".join(self.pop(2)) if name == "STACK_GLOBAL" else argument))
        elif name == "REDUCE":
            called, given = self.pop(2)
            stack.append(_called(called, given))
        elif name == "BUILD":
            made, state = self.pop(2)
            stack.append(_built(made, state))
        else:
            raise _Refused(f"the instruction {name}")

    def pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise _Refused("an empty stack")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def since_mark(self) -> list[Any]:
        return self.pop(len(self.stack) - self.marks.pop())


def _known(name: str) -> _Name:
    if name not in _NAMES:
        raise _Refused(f"the name {name!r:.80}")
    return _Name(name)


def _called(called: Any, given: Any) -> Any:
    if not isinstance(called, _Name):
        raise _Refused("a call of a value")
    if called in _ARRAY:
        return _Array()
    if called == "numpy dtype":
        return _Type(given[0])
    if called == "_codecs encode" and given[1:] == ("latin1",):  # how Python 3 writes bytes for Python 2
        return given[0].encode("latin1")
    raise _Refused(f"a call of {called}")


def _built(made: Any, state: Any) -> Any:
    if isinstance(made, _Type):
        made.name = f"{'|' if state[1] in (b'|', '|') else '<' if state[1] in (b'<', '<') else '>'}{made.name}"
        return made
    if not isinstance(made, _Array):
        raise _Refused("a state for a value")
    _, shape, kind, by_columns, content = state
    dtype = np.dtype(kind.name)
    if dtype.kind not in _KINDS:
        raise _Refused(f"an array of {dtype}")
    flat = np.frombuffer(content, dtype)
    made.value = flat.reshape(shape, order="F" if by_columns else "C")
    return made


def _resolved(value: Any) -> Any:
    """With arrays in the place of what waited for their contents."""
    if isinstance(value, _Array):
        if value.value is None:
            raise _Refused("an array without contents")
        return value.value
    if isinstance(value, dict):
        return {key: _resolved(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_resolved(each) for each in value)
    if isinstance(value, _Name | _Type):
        raise _Refused(f"the name {value}")
    return value
