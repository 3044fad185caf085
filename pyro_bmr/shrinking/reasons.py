"""Why channels are kept that could otherwise be removed.

Owns `reasons_of`. Next: `layer_table.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import fx

from pyro_bmr.shrinking.analysis import Analysis
from pyro_bmr.shrinking.contractions import Read
from pyro_bmr.shrinking.recurrent import GATES
from pyro_bmr.shrinking.states import State, layer_of, operation


def reasons_of(analysis: Analysis) -> Mapping[str, str]:
    """Layer → why channels of it are kept."""
    used = {layer_of(n) for n in analysis.states if n in analysis.depends}
    found = {layer: why for layer, why in analysis.reasons.items() if layer in used}
    for read in analysis.reads:
        if read.layer:
            if why := _padding(analysis, read):
                found[read.layer] = why
            elif (why := _units(analysis, read)) or (
                why := _constant_outputs(analysis, read.node, read)
            ):
                found.setdefault(read.layer, why)
    return found


def _padding(analysis: Analysis, read: Read) -> str:
    if read.broken is None:
        return ""
    kept = read.broken & analysis.kept(read.inputs)
    if not kept.any():
        return ""
    return (
        f"reads the constant input channels {kept.nonzero()[0].tolist()} through zero padding,"
        " where a constant is not a bias; they are kept"
    )


def _units(analysis: Analysis, read: Read) -> str:
    """Why the units of a recurrent layer are kept, whether or not anything reads them."""
    own = operation(read.node) in GATES and read.tables[0][1] is read.inputs
    if not own or analysis.prunable(read.inputs):
        return ""
    return f"its units are kept: {analysis.reason(read.inputs)}"


def _constant_outputs(analysis: Analysis, node: fx.Node, read: Read) -> str:
    """Why channels of a layer are kept that are constant, or read nothing."""
    state = analysis.states[node]
    if (
        not isinstance(state, State)
        or not read.tables
        or not analysis.graph.tensors.get(
            node.args[1] if len(node.args) > 1 else None  # type: ignore[arg-type]
        )
    ):
        return ""
    outputs = read.tables[0][1]
    axis = next((k for k, ids in enumerate(state.axes) if ids is outputs), None)
    if axis is None:
        return ""
    others = [k for k in range(state.unknown.ndim) if k != axis]
    known = ~(state.unknown.any(dim=others) if others else state.unknown).numpy()
    kept = known & analysis.kept(outputs)
    if not kept.any():
        return ""
    places = kept.nonzero()[0]
    why = analysis.reason(outputs[places])
    return f"constant channels {_listed(places)} are kept: {why}" if why else ""


def _listed(places: np.ndarray) -> str:
    some = ", ".join(str(k) for k in places[:6])
    return f"[{some}{', …' if len(places) > 6 else ''}]"
