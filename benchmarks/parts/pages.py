"""Tables in Markdown, and the places for them on the pages of docs/results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table."""
    head, *lines = ("| " + " | ".join(row) + " |" for row in (columns, *rows))
    return [head, "|" + "---|" * len(columns), *lines]


def fill(page: Path, lines: Iterable[str], mark: str = "table") -> None:
    """Writes the lines between the marks of the page, <!-- mark --> and <!-- end of mark -->."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    text = page.read_text(encoding="utf-8")
    before, after = text.split(begin)[0], text.split(end)[1]
    page.write_text(before + "\n".join([begin, *lines, end]) + after, encoding="utf-8")
