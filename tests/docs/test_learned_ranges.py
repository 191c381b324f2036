"""Sentences about what was learned say the ranges that the tables beside them say, which are made from the records."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("docs/learning.md", "docs/learning-gap.md", "README.md")
Difference = tuple[float | None, float, float]

_NUMBER = r"([+−-]?\d+\.\d)"
_CELL = re.compile(rf"{_NUMBER}% \({_NUMBER} … {_NUMBER}\)")
_SAID = re.compile(rf"(?:{_NUMBER}%,? ?\(?)?(?<![\d.]){_NUMBER} to {_NUMBER}(?![\d.])")


def measured(text: str) -> set[Difference]:
    """Mean, least and greatest of the differences in a page's tables, per cent."""
    return {_numbers(found) for found in _CELL.findall(text)}


def said(text: str) -> list[Difference]:
    """Of the sentences: ranges in parentheses, each with the mean before it; None: none is directly before it."""
    sentences = " ".join(line.strip() for line in text.splitlines() if not _CELL.search(line))
    inside = re.finditer(r"(?:[+−-]?\d+\.\d% )?\([^()]*\)", sentences)
    return [_numbers(found) for part in inside for found in _SAID.findall(part[0])]


def is_measured(difference: Difference, known: set[Difference]) -> bool:
    """Whether it stands in a table, or its opposite does ("behind by")."""
    mean, low, high = difference
    return any(
        (low, high) in ((least, most), (-most, -least)) and (mean is None or abs(mean) == abs(middle or 0.0))
        for middle, least, most in known
    )


def _numbers(found: tuple[str, str, str]) -> Difference:
    mean, low, high = (float(text.replace("−", "-")) if text else None for text in found)
    assert low is not None and high is not None
    return mean, low, high


def test_ranges_in_sentences_are_those_of_the_tables() -> None:
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    known = set().union(*map(measured, texts.values()))
    sentences = [(page, difference) for page, text in texts.items() for difference in said(text)]
    assert len(sentences) > 30
    assert [found for found in sentences if not is_measured(found[1], known)] == []


@pytest.mark.parametrize(
    ("sentence", "true"),
    [
        ("ends at −0.7% (−1.2 to −0.4), in less time", True),
        ("ends 0.7% below it (K = 8: 0.4 to 1.2)", True),
        ("is level (−0.7%,\n−1.2 to −0.4)", True),
        ("ends at −0.8% (−1.2 to −0.4)", False),
        ("ends at −0.7% (−1.2 to −0.3)", False),
        ("is level (−0.6%, −1.2 to −0.4)", False),
    ],
)
def test_a_sentence_that_fell_behind_its_table_is_found(sentence: str, true: bool) -> None:
    known = measured("| G = 4 | 3 | -0.7% (-1.2 … -0.4) | +1.0% (one seed) |")
    assert len(known) == len(said(sentence)) == 1
    assert is_measured(said(sentence)[0], known) is true
