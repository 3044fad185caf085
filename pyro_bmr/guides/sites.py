"""Checks that a guide has the latent sites of its program, with the same names and shapes, and
observes nothing.

Owns `check_guide` and `guide_shapes`. Pyro itself draws a site that is not in the guide from its
prior, and broadcasts a site of another shape. Next: `posteriors/site.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pyro_bmr.errors import ModelError

_MEND = "make the guide from this program and its rows"


def check_guide(guide: Mapping[str, torch.Size], program: Mapping[str, torch.Size]) -> None:
    """Raises ModelError unless guide and program have latent sites of the same names and shapes."""
    if missing := [name for name in program if name not in guide]:
        raise ModelError(
            f"site '{missing[0]}' of the program is not in the guide, whose sites are:"
            f" {_listed(guide)}; {_MEND}"
        )
    if extra := [name for name in guide if name not in program]:
        raise ModelError(
            f"site '{extra[0]}' of the guide is no latent site of the program, whose sites are:"
            f" {_listed(program)}; {_MEND}"
        )
    for name, shape in program.items():
        if guide[name] != shape:
            raise ModelError(
                f"site '{name}': expected a guide with its shape in the program, {tuple(shape)},"
                f" got {tuple(guide[name])}; {_MEND}"
            )


def guide_shapes(trace: Any) -> dict[str, torch.Size]:
    """Site → the shape of its value, for the sites of a guide that are no auxiliary ones.

    Raises:
        ModelError: the guide observes something, which its density would leave out.
    """
    for name, site in trace.nodes.items():
        if (
            site["type"] == "sample"
            and site["is_observed"]
            and not site["infer"].get("_deterministic")
        ):
            raise ModelError(
                f"site '{name}' of the guide is observed; a guide has latent sites alone: take the"
                " observation out of it"
            )
    return {
        name: site["value"].shape
        for name, site in trace.iter_stochastic_nodes()
        if not site["infer"].get("is_auxiliary")
    }


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"
