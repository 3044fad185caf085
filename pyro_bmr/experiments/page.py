"""report.html: one file with its table, pictures, style and script inside it; nothing is fetched,
and without JavaScript all of it can be read.

Owns `page` and `Section`. Next: `report.py`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from pyro_bmr.experiments.plots import DPI

if TYPE_CHECKING:
    import pandas as pd

_TEXT = ("model", "data", "method")
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60666d; --line: #d9dde1; --paper: #fff; --shade: #f3f5f7; --mark: #0b63b0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9aa2aa; --line: #363c43; --paper: #15181c; --shade: #1f242a; --mark: #79b8f3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 82rem; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem; }
p.state { margin: .25rem 0 1.5rem; color: var(--soft); }
.controls { display: flex; gap: .5rem; flex-wrap: wrap; align-items: center; margin-bottom: .75rem; }
.controls input, .controls select { font: inherit; padding: .3rem .5rem; border: 1px solid var(--line); border-radius: 6px; background: var(--paper);
  color: inherit; }
.controls input { flex: 1 1 14rem; max-width: 24rem; } .controls span { color: var(--soft); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th.text, td.text { text-align: left; } th { background: var(--shade); font-weight: 600; } tbody tr:last-child td { border-bottom: 0; }
tbody tr:hover td { background: var(--shade); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--mark); }
th[aria-sort=ascending] button::after { content: " ▲"; color: var(--mark); } th[aria-sort=descending] button::after { content: " ▼"; color: var(--mark); }
figure { margin: 0 0 1.25rem; padding: .75rem; background: #fff; border: 1px solid var(--line); border-radius: 8px; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; } figcaption { color: #60666d; font-size: .85rem; padding-top: .5rem; }
pre { margin: 0; padding: .9rem 1rem; overflow-x: auto; background: var(--shade); border-radius: 8px; font: 13px/1.45 ui-monospace, monospace; }
.failed code { overflow-wrap: anywhere; }
@page { size: landscape; margin: 12mm; }
@media print { :root { --ink: #000; --soft: #444; --line: #ccc; --paper: #fff; --shade: #f3f3f3; } body { max-width: none; padding: 0; font-size: 9pt; }
  .controls { display: none !important; } .wide { overflow: visible; border: 0; } th, td { padding: .15rem .3rem; font-size: 7pt; white-space: normal; }
  pre { white-space: pre-wrap; } thead { display: table-header-group; } h2 { break-after: avoid; } tr { break-inside: avoid; } }
"""
_SCRIPT = """
const table = document.querySelector("#results"), body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
const value = (row, k) => heads[k].className === "text" ? row.cells[k].textContent : parseFloat(row.cells[k].dataset.value);
heads.forEach((head, k) => {
  const button = document.createElement("button");
  button.textContent = head.textContent; button.title = "sort"; head.replaceChildren(button);
  button.onclick = () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const order = (a, b) => { const x = value(a, k), y = value(b, k);
      if (typeof x === "string") return up ? x.localeCompare(y) : y.localeCompare(x);
      return (isNaN(x) - isNaN(y)) || (up ? x - y : y - x); };
    body.append(...rows.sort(order));
  };
});
const controls = document.querySelector(".controls"), count = document.createElement("span"), find = document.createElement("input"), picks = [];
const show = () => {
  let shown = 0;
  for (const row of rows) {
    const fits = row.textContent.toLowerCase().includes(find.value.toLowerCase())
      && picks.every(([k, pick]) => !pick.value || row.cells[k].textContent === pick.value);
    row.hidden = !fits; shown += fits;
  }
  count.textContent = `${shown} of ${rows.length} rows`;
};
find.type = "search"; find.placeholder = "find in the table"; find.ariaLabel = find.placeholder; find.oninput = show; controls.append(find);
heads.forEach((head, k) => {
  const found = head.className === "text" ? [...new Set(rows.map(row => row.cells[k].textContent))] : [];
  if (found.length < 2) return;
  const pick = document.createElement("select");
  pick.ariaLabel = head.textContent; pick.onchange = show;
  pick.append(new Option(`every ${head.textContent}`, ""), ...found.map(name => new Option(name, name)));
  picks.push([k, pick]); controls.append(pick);
});
controls.append(count); show();
"""


@dataclass(frozen=True)
class Section:
    """A heading, and under it pictures (caption, PNG)."""

    title: str
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
        if name in _TEXT:
            return f'<td class="text">{text}</td>'
        value = float(str(mean.iat[row, column]))
        return f'<td data-value="{"" if math.isnan(value) else repr(value)}">{text}</td>'

    head = "".join(
        f'<th class="text">{escape(name)}</th>' if name in _TEXT else f"<th>{escape(name)}</th>"
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
