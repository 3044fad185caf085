"""Nothing is loaded from another site: a check of every page and style sheet that was built.

An extension of Sphinx.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import SphinxError

_ELSEWHERE = r"""["']?(?:https?:)?//[^"'\s)>]*"""
_LOADS = re.compile(
    rf"<(?:script|img|iframe|source|audio|video|embed)\b[^>]*\ssrc={_ELSEWHERE}"
    rf"|<link\b(?![^>]*\brel=[\"']?(?:canonical|author))[^>]*\shref={_ELSEWHERE}"
    rf"|\burl\({_ELSEWHERE}|@import\s+{_ELSEWHERE}"
)


def _on_build_finished(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    for path in sorted(Path(app.outdir).rglob("*")):
        if path.suffix in (".html", ".css") and (
            found := _LOADS.search(path.read_text(encoding="utf-8"))
        ):
            raise SphinxError(f"{path}: expected only files of the site, got {found[0]}")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("build-finished", _on_build_finished)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
