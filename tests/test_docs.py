"""The documentation runs: every python block of docs/*.md and README.md, every relative link, every
"`name` in [file]" reference.

The blocks of one page share a namespace and run in order, in an empty folder. A block after the
line `<!-- not run -->` is skipped.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pyro
import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md"]
NOT_RUN = "<!-- not run -->"


class Block(NamedTuple):
    line: int  # of its first line of code, from 1
    code: str


def python_blocks(text: str) -> list[Block]:
    """The blocks to run, in order."""
    blocks, lines, k = [], text.splitlines(), 0
    while k < len(lines):
        opening = re.match(r"\s*(`{3,}|~{3,})\s*(\w*)", lines[k])
        if opening is None:
            k += 1
            continue
        end = next((j for j in range(k + 1, len(lines)) if lines[j].strip() == opening[1]), None)
        assert end is not None, f"the block at line {k + 1} has no end"
        before = [line for line in lines[:k] if line.strip()]
        if opening[2] in ("python", "py") and not (before and before[-1].strip() == NOT_RUN):
            blocks.append(Block(k + 2, "\n".join(lines[k + 1 : end])))
        k = end + 1
    return blocks


def prose(text: str) -> str:
    """The page without its code blocks."""
    return re.sub(r"^\s*```.*?^\s*```\s*$", "", text, flags=re.M | re.S)


# Pages whose examples take seconds; the examples of the others are run in the fast suite.
LONG = {
    *(
        "README.md",
        "add_a_prior.md",
        "bring_your_data.md",
        "choose_a_guide.md",
        "choose_a_likelihood.md",
        "choose_a_prior.md",
        "convergence.md",
        "gotchas.md",
        "index.md",
        "studies.md",
    ),
    *("param_store_script.md", "guarantees.md", "tables.md", "skeletons.md"),
    *("smaller_networks.md", "tutorial_pruning.md", "tutorial_regression.md"),
}


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.slow) if p.name in LONG else p for p in PAGES],
    ids=lambda page: page.name,
)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = python_blocks(page.read_text(encoding="utf-8"))
    # tracebacks show the line of the page
    trees = [ast.parse("\n" * (block.line - 1) + block.code, str(page)) for block in blocks]
    monkeypatch.chdir(tmp_path)
    random_state, dtype = pyro.util.get_rng_state(), torch.get_default_dtype()
    pyro.clear_param_store()
    namespace: dict[str, object] = {"__name__": "page"}
    try:
        for tree in trees:
            exec(compile(tree, str(page), "exec", dont_inherit=True), namespace)
        assert torch.get_default_dtype() == dtype, "the page changes the default dtype"
    finally:
        torch.set_default_dtype(dtype)
        pyro.clear_param_store()
        pyro.util.set_rng_state(random_state)
        plt.close("all")
    if blocks and page in DOCS:
        assert any(
            isinstance(statement, ast.Assert) for tree in trees for statement in tree.body
        ), "the page asserts nothing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_have_a_target(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), f"{link}: no such file"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", prose(target.read_text(encoding="utf-8")), flags=re.M)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles
            }, f"{link}: no such heading"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_named_code_is_where_the_page_says(page: Path) -> None:
    for name, link in re.findall(
        r"`([\w.]+)` in \[[^\]]+\]\(([^)\s]+\.py)\)", page.read_text(encoding="utf-8")
    ):
        tree = ast.parse((page.parent / link).read_text(encoding="utf-8"))
        defined = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        assert set(name.split(".")) <= defined, f"`{name}` is not in {link}"


def test_each_stop_of_the_walk_names_the_next() -> None:
    overview = ROOT / "docs" / "index.md"
    walk = overview.read_text(encoding="utf-8").partition("## From the README to the formula")[2]
    stops = re.findall(r"^\d+\. (.+)$", walk.partition("\n## ")[0], flags=re.M)
    code = [re.match(r"`(\w+)` in \[[^\]]+\]\(([^)]+)\)", stop) for stop in stops]
    found = [match for match in code if match is not None]
    assert len(stops) <= 9 and code == [None, None, None, *found]
    assert "docs/index.md#from-the-readme-to-the-formula" in (ROOT / "README.md").read_text("utf-8")
    before = overview.parent / re.search(r"\]\(([^)#]+)#", stops[2])[1]
    lines = 0
    for match in found:
        name, link = match.groups()
        text = before.read_text(encoding="utf-8")
        assert f"`{name}`" in text, f"{before.name} does not name `{name}`, the next stop"
        before = overview.parent / link
        for line in re.findall(r"\*\*the line [^*]+\*\* is `([^`]+)`", match.string):
            assert line.removesuffix("(...)") in before.read_text(encoding="utf-8"), line
            lines += 1
    assert lines == 3


def test_blocks_are_found_and_skipped() -> None:
    text = (
        f"text\n\n```python\na = 1\n```\n\n{NOT_RUN}\n\n```python\nboom\n```\n```sh\nls\n```\n "
        " ```python\nb = 2\nc = 3\n```\n"
    )
    assert python_blocks(text) == [Block(4, "a = 1"), Block(16, "b = 2\nc = 3")]
    assert "boom" not in prose(text)


def test_every_page_is_seen() -> None:
    assert {
        "index.md",
        "notation.md",
        "how_it_works.md",
        "gotchas.md",
        "param_store_script.md",
        "choose_a_guide.md",
    } <= {page.name for page in DOCS}
