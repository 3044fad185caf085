"""report.html, one file that contains its table, pictures, style and script. Nothing is fetched,
and the page can be read without JavaScript.

Owns `page` and `Section`. Next: `report.py`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from pyro_bmr.experiments.plots import DPI

if TYPE_CHECKING:
    import pandas as pd

TEXT = ("model", "data", "prior", "route", "method", "coefficient", "class")
"""The columns of a table that are words."""
_STYLE, _SCRIPT = (
    files("pyro_bmr.experiments").joinpath(name).read_text("utf-8")
    for name in ("page.css", "page.js")
)


@dataclass(frozen=True)
class Section:
    """A heading, and under it the sentences about its rows and its pictures (caption, PNG)."""

    title: str
    sentences: Sequence[str]
    pictures: Sequence[tuple[str, bytes]]


def page(
    title: str,
    state: str,
    texts: pd.DataFrame,
    mean: pd.DataFrame,
    sections: Sequence[Section],
    failures: Mapping[str, str],
    notes: Mapping[str, str],
) -> str:
    """The page: a table of `texts`, sorted by the numbers of `mean` in the same places, then
    pictures, failures and notes.
    """
    parts = [
        "<!doctype html>",
        (
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
            f' content="width=device-width"><title>{escape(title)}</title>'
        ),
        f"<style>{_STYLE}</style></head><body>",
        f'<h1>{escape(title)}</h1><p class="state">{escape(state)}</p>',
        '<div class="controls"></div>',
        _table(texts, mean),
    ]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        said = "".join(f"<li>{escape(sentence)}</li>" for sentence in section.sentences)
        parts += [f'<ul class="said">{said}</ul>'] if said else []
        for caption, png in section.pictures:
            source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
            width = int.from_bytes(png[16:20], "big") * 96 // DPI  # all letters in one size
            parts.append(
                f'<figure><img alt="{escape(caption)}" width="{width}"'
                f' src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'
            )
    if failures:
        lines = "".join(
            f"<li><code>{escape(name)}</code>: {escape(line)}</li>"
            for name, line in failures.items()
        )
        parts.append(f'<h2>Failed</h2><ul class="failed">{lines}</ul>')
    parts += [
        f"<h2>{escape(name)}</h2><pre>{escape(text.strip())}</pre>" for name, text in notes.items()
    ]
    return "\n".join([*parts, f"<script>{_SCRIPT}</script></body></html>", ""])


def _table(texts: pd.DataFrame, mean: pd.DataFrame) -> str:
    def cell(row: int, column: int, name: str) -> str:
        text = escape(str(texts.iat[row, column]))
        if name in TEXT:
            return f'<td class="text">{text}</td>'
        value = float(str(mean.iat[row, column]))
        return f'<td data-value="{"" if math.isnan(value) else repr(value)}">{text}</td>'

    head = "".join(
        f'<th class="text">{escape(name)}</th>' if name in TEXT else f"<th>{escape(name)}</th>"
        for name in map(str, texts.columns)
    )
    rows = (
        "".join(cell(row, column, str(name)) for column, name in enumerate(texts.columns))
        for row in range(len(texts))
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        '<div class="wide"><table'
        f' id="results"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )
