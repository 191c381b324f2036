"""The parser that a script or a benchmark would read its command line with, without running it."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.forks import ROOT


class Parsed(BaseException):
    """Ends a script where it has its parser."""


def parser_of(path: str) -> argparse.ArgumentParser:
    """What the script would parse its command line with."""
    found: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        found.append(parser)
        raise Parsed

    stopping = mock.patch.multiple(argparse.ArgumentParser, parse_args=stop, parse_known_args=stop)
    with stopping, mock.patch.object(sys, "argv", [path]), pytest.raises(Parsed):
        if Path(path).name == "__main__.py" or path.startswith("benchmarks"):
            module = ".".join(Path(path).with_suffix("").parts).removesuffix(".__main__")
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / path), run_name="__main__")
    return found[0]
