"""The guide that a fit trains, made of its program and held against it.

Owns `make_guide`. Next: `start.py`.
"""

from __future__ import annotations

import copy
import inspect
import secrets
from collections.abc import Mapping
from typing import Any

import pyro
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyro_bmr.errors import CANNOT_RUN, FitError, first_line
from pyro_bmr.fitting.arguments import Program
from pyro_bmr.fitting.rows import Batch
from pyro_bmr.guides.sites import check_guide, guide_shapes

_BY_SVI = (
    "train it with Pyro's SVI and read it with Posterior.from_guide, or give a guide module, such"
    " as MeanField or AutoNormal"
)


def make_guide(
    guide: Program, program: Program, example: Batch, latents: Mapping[str, Tensor]
) -> Program:
    """The guide that a fit trains: a copy of the module, or what the function makes of the program
    and, if it takes one, of a batch.

    Raises:
        FitError: it is a function of the rows with statements of Pyro's in it, or what comes out
            cannot be called.
        ModelError: its sites are not the latent sites of the program.
    """
    if isinstance(guide, nn.Module):
        made: Program = copy.deepcopy(guide)
    else:
        made = _made(guide, program, example)
    _name_apart(made)
    with pyro.get_param_store().scope():
        try:
            poutine.block(made)(*example)  # autoguides make their parameters at the first call
            trace = prune_subsample_sites(poutine.trace(made).get_trace(*example))
        except CANNOT_RUN as error:
            raise FitError(
                f"the guide {_name(made)} does not run on rows of the data: {first_line(error)}"
            ) from error
    params = [name for name, site in trace.nodes.items() if site["type"] == "param"]
    if params and not isinstance(made, nn.Module):
        raise FitError(f"pyro.param '{params[0]}' of the guide would not be trained; {_BY_SVI}")
    check_guide(guide_shapes(trace), {name: value.shape for name, value in latents.items()})
    return made


def _made(guide: Program, program: Program, example: Batch) -> Any:
    parameters = inspect.signature(guide).parameters.values()
    # MeanField(program, *batch), AutoNormal(program)
    takes_batch = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    with pyro.get_param_store().scope():
        try:
            made = guide(program, *example) if takes_batch else guide(program)
        except CANNOT_RUN as error:
            raise FitError(
                f"guide: {_name(guide)} makes no guide of the program ({first_line(error)}); if it"
                f" is a guide itself, {_BY_SVI}"
            ) from error
    if not callable(made):
        raise FitError(
            f"guide: {_name(guide)} makes no guide of the program, but {type(made).__name__}; if it"
            f" is a guide itself, {_BY_SVI}"
        )
    return made


def _name_apart(guide: Any) -> None:
    """Gives the parameters of a guide of Pyro's names of their own: outside a fit it looks them up
    by name in the global store, where another fit's may be.
    """
    if isinstance(guide, PyroModule):
        root = f"{guide._pyro_name}_{secrets.token_hex(4)}"
        for path, module in guide.named_modules():
            if isinstance(module, PyroModule):
                module._pyro_name = f"{root}.{path}" if path else root


def _name(value: Any) -> str:
    return str(getattr(value, "__qualname__", type(value).__name__))
