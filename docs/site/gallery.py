"""The examples of docs/gallery as pages: prose, code, and below it what the code printed and drew.

An extension of Sphinx: a parser of scripts in the percent format. They run when the site is built,
each in a process and an empty folder of its own.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jupytext
from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from nbclient import NotebookClient
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    # Pyro's progress bar misses the widgets of a notebook.
    "PYTHONWARNINGS": "ignore:IProgress not found",
}


def executed(script: str) -> str:
    """The Markdown of a script, with its outputs."""
    notebook = jupytext.reads(script, fmt="py:percent")
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, _ENVIRONMENT):
        NotebookClient(
            notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    parts = []
    for cell in notebook.cells:
        parts.append(
            cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```"
        )
        parts += map(_shown, cell.get("outputs", []))
    return "\n\n".join(parts)


def _shown(output: dict[str, Any]) -> str:
    """One output of a cell: a picture, a table, or text. A warning is not expected."""
    if output.get("name") == "stderr":
        raise ValueError(f"expected an example without warnings, got {output['text']}")
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        url = f"data:image/png;base64,{data['image/png'].strip()}"
        return f'<img class="output" alt="what the code above draws" src="{url}">'
    if "text/html" in data:
        return f'<div class="output">{_bare(data["text/html"])}</div>'
    return f"```{{code-block}} text\n:class: output\n\n{data['text/plain'].rstrip()}\n```"


def _bare(html: str) -> str:
    """The table of pandas without its style sheet and empty lines, which would end the block."""
    start = html.index("<table")
    table = (
        html[start : html.index("</table>") + len("</table>")]
        .replace(' border="1" class="dataframe"', "")
        .replace(' style="text-align: right;"', "")
    )
    return "".join(line.strip() for line in table.splitlines())


class GalleryParser(MystParser):
    """Runs a script and reads what comes out as a page."""

    supported = ("gallery",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Called by Sphinx with the text of the script."""
        super().parse(executed(inputstring), document)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_source_parser(GalleryParser)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
