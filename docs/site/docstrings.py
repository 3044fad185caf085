"""Docstrings of properties as they are written. An extension of Sphinx."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx. Napoleon reads a first line with a colon, of a property, as its type."""
    written: dict[str, list[str]] = {}

    def before(
        app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
    ) -> None:
        if what in ("property", "attribute", "data"):
            written[name] = list(lines)

    def after(
        app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
    ) -> None:
        if name in written:
            lines[:] = written.pop(name)

    app.connect("autodoc-process-docstring", before, priority=400)
    app.connect("autodoc-process-docstring", after, priority=600)  # napoleon has 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
