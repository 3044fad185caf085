"""Equations as MathML, which browsers draw themselves: no reader has to download a script for them.

An extension of Sphinx.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import SphinxError

# A function's name is an identifier to latex2mathml, and touches its argument; as an operator it
# has the thin spaces that LaTeX sets.
_FUNCTION = re.compile(
    r"<mi>(arg|cos|det|dim|exp|inf|ker|ln|log|max|min|sign|sin|sup|tanh|tr)</mi>(?=(<mo[^>]*>(?:\(|&#x00028;))?)"
)

# Browsers set these as operators between two terms, with spaces; here they are the bars of a
# determinant or a size, and a slash.
_TIGHT = re.compile(r"<mo([^>]*)>(\||/|&#x0007C;|&#x0002F;)</mo>")


class EquationError(SphinxError):
    """An equation that would be shown as LaTeX."""

    category = "Equation"


def mathml(latex: str, display: str) -> str:
    r"""The MathML of an equation, `display` being "inline" or "block".

    Raises:
        EquationError: a command is not known, and would be shown by its name.
    """
    latex = re.sub(r"\\arg(?![a-z])", r"\\operatorname{arg}", latex)
    try:
        converted = convert(latex, display=display)
    except Exception as error:
        raise EquationError(
            f"expected LaTeX that latex2mathml reads, got {latex!r}: {error!r}"
        ) from None
    if unknown := re.search(r">(\\[a-zA-Z]+)<", converted):
        raise EquationError(
            f"expected commands that latex2mathml knows, got {unknown[1]} in {latex!r}"
        )
    converted = _TIGHT.sub(r'<mo\1 lspace="0" rspace="0">\2</mo>', converted)
    return _FUNCTION.sub(_operator, converted)


def _operator(name: re.Match[str]) -> str:
    after = "0" if name[2] else "0.167em"  # none before a bracket
    return f'<mo form="prefix" lspace="0.167em" rspace="{after}">{name[1]}</mo>'


def _inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(_inline, None), block_renderers=(_block, None)
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
