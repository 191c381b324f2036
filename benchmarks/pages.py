"""Pages whose tables are made from records."""

from __future__ import annotations

from collections.abc import Iterable


def markdown(table: list[list[str]]) -> str:
    """A table, its first row the header."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def filled(text: str, tables: Iterable[tuple[str, list[list[str]]]]) -> str:
    """A page with each table between ``<!-- table: TITLE -->`` and ``<!-- end -->`` made again."""
    for title, table in tables:
        start, end = f"<!-- table: {title} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if found:
            text = f"{before}{start}\n{markdown(table)}\n\n{end}{rest.partition(end)[2]}"
    return text
