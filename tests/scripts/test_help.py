"""--help of every script and benchmark: each argument is explained, each option says what holds without it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from tests.forks import ROOT
from tests.parsers import parser_of

MAIN = 'if __name__ == "__main__"'
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("scripts", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if MAIN in path.read_text(encoding="utf-8") and path.parent.name != "cases"
)


def arguments(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.Action, str]]:
    """Those of the parser and of its commands, with the help that is shown."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from arguments(command)
        elif action.help != argparse.SUPPRESS:
            yield action, formatter._get_help_string(action) or ""


def test_all_commands_are_found() -> None:
    assert {"scripts/train_lm.py", "scripts/plan.py", "benchmarks/speed/__main__.py"} <= set(FILES)


@pytest.mark.parametrize("path", FILES)
def test_help_explains_every_argument_and_says_its_default(path: str) -> None:
    parser = parser_of(path)
    assert parser.description and len(parser.description) > 40
    help_text = parser.format_help()
    assert str(ROOT) not in help_text, "a path of this machine"
    alternatives = {action.dest for group in parser._mutually_exclusive_groups if group.required
                    for action in group._group_actions}  # fmt: skip
    silent = [
        action.option_strings or action.dest
        for action, words in arguments(parser)
        if not words or _may_be_left_out(action, alternatives) and "default" not in words
    ]
    assert not silent


def _may_be_left_out(action: argparse.Action, alternatives: set[str]) -> bool:
    """Whether it takes a value and has one without being given."""
    return bool(action.option_strings) and not action.required and action.nargs != 0 and action.dest not in alternatives
