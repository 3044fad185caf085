"""Links that work in both places, and the pages behind them. An extension of Sphinx.

In the repository a page links to a file where it lies, `../pyro_bmr/files.py`; on the site the same
link leads to a page with that file. The pages of docs/project stand for files at the top of the
repository. The contents of the site are here too, so that docs/index.md stays plain Markdown.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import SphinxError

ROOT = Path(__file__).resolve().parents[2]
PROJECT = {
    "CONTRIBUTING.md": "project/contributing",
    "CHANGELOG.md": "project/changes",
    "SECURITY.md": "project/security",
    "README.md": "index",
}
STAGES = ("declare", "fit", "posterior", "reduce", "prune", "export", "refit", "compare", "errors")
CONTENTS = {
    "Start": ["how_it_works", "notation", "gotchas", "guarantees"],
    "Choose": [
        "choose_a_prior",
        "choose_a_likelihood",
        "choose_a_guide",
        "convergence",
        "add_a_prior",
        "skeletons",
    ],
    "Do": [
        "bring_your_data",
        "param_store_script",
        "tables",
        "tutorial_regression",
        "tutorial_pruning",
        "smaller_networks",
        "studies",
        "several_processes",
    ],
    "Gallery": [
        "gallery/regression_table",
        "gallery/pruned_digits",
        "gallery/pyro_program",
        "gallery/numpyro_model",
        "gallery/pymc_model",
    ],
    "Reference": [*(f"api/{stage}" for stage in STAGES), "api/tables"],
    "Results": ["results/*"],
    "Project": list(PROJECT.values())[:3],
}
_LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash", ".md": "markdown"}
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^ *```.*?^ *```[ \t]*$)", flags=re.M | re.S)


def site_links(text: str, docname: str, path: str) -> tuple[str, set[str]]:
    """The Markdown of the file `path` with the links of a page, and the source files it names."""
    linked: set[str] = set()
    here = posixpath.dirname(docname) or "."

    def link(found: re.Match[str]) -> str:
        words, anchor = found[1], found[3] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), found[2]))
        if target in PROJECT:
            site = f"{PROJECT[target]}.md"
        elif target.startswith("docs/"):
            site = target.removeprefix("docs/")
        elif (ROOT / target).is_file() and posixpath.splitext(target)[1] in _LANGUAGES:
            # `source_pages` makes its page, which MyST does not know: a tag, no Markdown link.
            linked.add(target)
            return f'<a href="{posixpath.relpath(f"source/{target}.html", here)}">{words}</a>'
        else:
            raise SphinxError(
                f"{path}: expected a link to a file of the repository, got {found[2]}"
            )
        return f"[{words}]({posixpath.relpath(site, here)}{anchor})"

    return "".join(
        part if k % 2 else _LINK.sub(link, part) for k, part in enumerate(_FENCE.split(text))
    ), linked


def _on_source_read(app: Sphinx, docname: str, source: list[str]) -> None:
    path = app.env.doc2path(docname)
    if not str(path).endswith(".md"):
        return
    file = next(
        (name for name, page in PROJECT.items() if page == docname and docname != "index"), None
    )
    text = (ROOT / file).read_text(encoding="utf-8") if file else source[0]
    source[0], linked = site_links(text, docname, file or f"docs/{docname}.md")
    app.env.metadata[docname]["linked"] = linked
    if docname == "index":
        source[0] += "".join(
            f"\n\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n"
            + "\n".join(pages)
            + "\n```\n"
            for caption, pages in CONTENTS.items()
        )


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for each file that another page links to."""
    for path in sorted(
        {path for about in app.env.metadata.values() for path in about.get("linked", ())}
    ):
        text = (ROOT / path).read_text(encoding="utf-8")
        code = app.builder.highlighter.highlight_block(
            text, _LANGUAGES[posixpath.splitext(path)[1]], linenos=False
        )
        yield f"source/{path}", {"title": path, "body": f"<h1>{path}</h1>{code}"}, "page.html"


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", _on_source_read)
    app.connect("html-collect-pages", source_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
