"""Whether a program infers the noise of its targets, which a fit at a temperature makes too small.

Owns `check_noise`. Next: `guide.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pyro.distributions import Delta, Unit
from torch import Tensor, nn
from torch.distributions import Categorical, biject_to, constraints
from torch.distributions.transforms import AffineTransform, ComposeTransform

from pyro_bmr.errors import FitError, PyroBMRError, warn
from pyro_bmr.fitting.arguments import Program
from pyro_bmr.fitting.program_run import running
from pyro_bmr.fitting.rows import Batch
from pyro_bmr.isolation import seed_generators
from pyro_bmr.tracing import Values

_LOCATIONS = {"loc", "rate", "probs", "logits"}
"""The parameters of distributions that say where their values are, not how far they spread."""
_PARTS = ("base_dist", "_component_distribution", "_mixture_distribution")
_STEP = 0.37  # by which a site is moved, on the unconstrained scale
_MEND = "give it as a number, as in Normal(noise=0.3), or leave temperature out"

Spread = dict[str, Tensor]


def check_noise(
    program: Program, batch: Batch, latent: Mapping[str, Tensor], temperature: float
) -> None:
    """Refuses a fit at a temperature that infers how far the targets spread.

    With σ² inferred, N(y; f, σ²)^{1/T} is a fit of f with the noise Tσ², whose residuals then set
    σ: the fit follows the rows more and more closely, and the noise follows the fit. So each latent
    site, and each trained parameter of a module, is moved by itself. Where a parameter of an
    observed distribution changes that is no location, such as a scale, the spread is inferred.
    Cut points and logits of classes are locations.

    Args:
        batch: rows on which the program runs.
        latent: the value of each latent site there.

    Raises:
        FitError: the temperature is not 1, and the spread of an observed site is inferred.

    Warns:
        PyroBMRWarning: an observed distribution does not tell its parameters.
    """
    if temperature == 1:
        return
    found: dict[str, dict[str, list[str]]] = {}
    supports, before = _spreads(program, batch, latent)
    unknown = [name for name, spread in before.items() if spread is None]
    moves = _moves(program, batch, latent, supports) if any(before.values()) else ()
    for source, moved in moves:
        for name, after in moved().items():
            was = before.get(name) or {}
            for parameter in was:
                if after is None or parameter not in after or _differ(was, after, parameter):
                    found.setdefault(name, {}).setdefault(parameter, []).append(source)
    for name, parameters in found.items():
        parameter = next(iter(parameters))
        every = list(dict.fromkeys(s for some in parameters.values() for s in some))
        shown = ", ".join(f"'{source}'" for source in every[:3])
        raise FitError(
            f"temperature={temperature:g}: expected 1 where the spread of the targets is inferred,"
            f" since a tempered fit makes it too small or too large; '{parameter}' of the observed"
            f" site '{name}' depends on {shown}{' and others' if len(every) > 3 else ''}; {_MEND}"
        )
    if unknown:
        warn(
            f"temperature={temperature:g}: the distribution of the observed site '{unknown[0]}'"
            " does not tell its parameters; if its spread is inferred, a tempered fit makes it too"
            " small or too large, and the temperature should be 1"
        )


def _differ(was: Mapping[str, Tensor], after: Mapping[str, Tensor], name: str) -> bool:
    one, other = was[name], after[name]
    return one.shape != other.shape or not torch.allclose(one, other, 1e-6, 0.0, equal_nan=True)


def _spreads(
    program: Program, batch: Batch, latent: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Spread | None]]:
    """The supports of the latent sites, and of each observed site the parameters of its spread,
    None where the distribution does not tell them; with every latent site at its value.
    """
    with running(program, batch), torch.random.fork_rng():
        seed_generators(0)
        with Values(dict(latent)) as run:
            program(*batch)
    seen = {name: msg["fn"] for name, msg in run.observed.items() if msg["is_observed"]}
    return (
        {name: msg["fn"].support for name, msg in run.latent.items()},
        {name: _spread(fn) for name, fn in seen.items()},
    )


def _moves(
    program: Program, batch: Batch, latent: Mapping[str, Tensor], supports: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[], dict[str, Spread | None]]]]:
    """What can be moved, with the spreads of the observed sites when it is."""

    def read(values: Mapping[str, Tensor]) -> dict[str, Spread | None]:
        try:
            return _spreads(program, batch, values)[1]
        except PyroBMRError:  # it does not run there, which says nothing
            return {}

    for name, value in latent.items():
        if name in supports and value.is_floating_point():
            other = _moved(value, supports[name])
            yield name, partial(read, {**latent, name: other})
    if not isinstance(program, nn.Module):
        return
    for name, parameter in program.named_parameters():
        lifted = name.removeprefix("net.") in latent
        if parameter.requires_grad and parameter.is_floating_point() and not lifted:

            def with_moved(parameter: nn.Parameter = parameter) -> dict[str, Spread | None]:
                with _shifted(parameter):
                    return read(latent)

            yield name, with_moved


def _moved(value: Tensor, support: Any) -> Tensor:
    """A value of the site elsewhere in its support."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    transform = biject_to(support)
    moved: Tensor = transform(transform.inv(value) + _STEP)
    return moved


@contextmanager
def _shifted(parameter: nn.Parameter) -> Iterator[None]:
    """Within it the parameter has another value; afterwards it is the same bit for bit."""
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(_STEP)
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(before)


def _spread(fn: Any) -> Spread | None:
    """The parameters of a distribution that are no locations, by name; those of what it is made
    of, too.
    """
    if isinstance(fn, (Unit, Delta)):  # a factor of any form
        return None
    if isinstance(fn, Categorical):  # of logits and cut points
        return {}
    names = set(getattr(fn, "arg_constraints", ()))
    if not names:
        parts = [getattr(fn, name, None) for name in _PARTS]
        inner = [_spread(part) for part in parts if part is not None]
        return _together(inner + [_scale_of(each) for each in getattr(fn, "transforms", ())])
    if {"concentration0", "concentration1"} <= names:
        return {"concentration": (fn.concentration0 + fn.concentration1).clone()}
    # without a loc, a scale says where the values are
    locations = _LOCATIONS if "loc" in names else _LOCATIONS | {"scale"}
    try:
        known = {name: getattr(fn, name) for name in names - locations}
    except (AttributeError, NotImplementedError):
        return None
    return {name: t.detach().clone() for name, t in known.items() if isinstance(t, Tensor)}


def _scale_of(transform: Any) -> Spread | None:
    """The scale of a transform; None for one that may have other parameters."""
    if isinstance(transform, ComposeTransform):
        return _together([_scale_of(part) for part in transform.parts] or [{}])
    if isinstance(transform, AffineTransform):
        return {"scale": torch.as_tensor(transform.scale).detach().clone()}
    has_tensors = any(isinstance(value, Tensor) for value in vars(transform).values())
    return None if has_tensors or isinstance(transform, nn.Module) else {}


def _together(inner: list[Spread | None]) -> Spread | None:
    """All parameters of the parts; None if there is no part, or one does not tell."""
    if not inner or any(one is None for one in inner):
        return None
    return {name: t for one in inner if one is not None for name, t in one.items()}
