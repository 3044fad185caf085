r"""Which sites of a program multiply each other, as the two factors of a low-rank matrix, or the
queries and keys of an attention layer, do.

Owns `with_products`. Where slices a of one site and b of another count only by their product, the
program gives for (c·a, b/c) what it gives for (a, b), for each c ≠ 0. For c near 1 that is a = b in

.. math:: s_a = \sum_{i \in a} w_i \frac{\partial}{\partial w_i} \log p(y \mid w), \qquad s_a = s_b,

which one gradient answers for all slices of all sites; a negative c, which no ReLU, tanh or norm
between the two lets pass, is then tried on those few pairs that agree (the symmetry is that of
Neyshabur, Salakhutdinov & Srebro 2015, arXiv 1506.02617). Next: `posterior_file.py`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_bmr.isolation import normal_numbers, seed_generators
from pyro_bmr.posteriors.from_guides import undisturbed
from pyro_bmr.posteriors.site import Site
from pyro_bmr.tracing import Values

_TRIES = 40  # pairs of slices on which a negative factor is tried
# a fused tensor of queries, keys and values, or of gate and value, has its slices in halves or
# thirds
_PARTS = (1, 2, 3)
# of a program at values that it does not take
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError)
_AGREE, _SAME = 1e-3, 1e-2  # of the scores of two slices; of the change that one factor alone makes


class Slices(NamedTuple):
    """`length` slices of a site along `dim`, from `start` on (dim −1: the whole site as one), with
    the same entries of its bias if `bias`; their s.
    """

    site: str
    dim: int
    start: int
    length: int
    bias: str
    scores: Tensor


def with_products(
    sites: Mapping[str, Site],
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Site]:
    """`sites`, each with those that it is multiplied with (`Site.multiplies`), as far as a few runs
    of `program(*args, **kwargs)` tell.

    Not seen are products that hold for no slice alone, as those of rotated queries and keys. A
    program that cannot be run at other values of its sites has none. Random state and param store
    stay as they were, and modules are in evaluation mode meanwhile.
    """
    pairs: set[tuple[str, str]] = set()
    device = next(iter(sites.values())).mean.device.type
    with (
        contextlib.suppress(*_REFUSALS),
        _evaluating(),
        torch.random.fork_rng(),
        torch.autocast(device, enabled=False),
    ):
        values = {
            name: _somewhere(number, site) for number, (name, site) in enumerate(sites.items())
        }
        with undisturbed(program), pyro.validation_enabled(False):
            pairs = _pairs(
                values,
                [name for name, site in sites.items() if site.support == "real"],
                lambda given: _log_probs(given, program, args, kwargs),
            )
    return {
        name: replace(site, multiplies=tuple(sorted(_partners(name, pairs))))
        for name, site in sites.items()
    }


def _partners(name: str, pairs: set[tuple[str, str]]) -> set[str]:
    return {other for pair in pairs if name in pair for other in set(pair) - {name} or {name}}


@contextlib.contextmanager
def _evaluating() -> Iterator[None]:
    """Puts every module that this thread runs in evaluation mode, so that no running statistics
    follow the values that are tried.
    """
    modes: dict[nn.Module, bool] = {}
    thread = threading.get_ident()

    def evaluate(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            modes.setdefault(module, module.training)
            module.training = False

    hook = register_module_forward_pre_hook(evaluate)
    try:
        yield
    finally:
        hook.remove()
        for module, mode in modes.items():
            module.training = mode


def _somewhere(number: int, site: Site) -> Tensor:
    """A generic point: numbers of the size of the site's own where it is real; zeros, as those of a
    bias or a low-rank update at its start, would hide all.
    """
    if site.support != "real":
        return site.value(site.mean)
    rms = site.mean.square().mean().sqrt()
    prior = torch.ones_like(rms) if site.prior is None else site.prior.var.mean().sqrt()
    noise = normal_numbers(site.mean.shape, number).to(site.mean)
    return noise * (rms if rms > 0 else 0.5 * prior.clamp_max(1)) * site.kept


def _log_probs(
    values: Mapping[str, Tensor],
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """log p(y | values) of every observed entry, flat."""
    seed_generators(0)
    with Values(values) as run:
        program(*args, **kwargs)
    parts = [
        msg["fn"].log_prob(msg["value"]).flatten()
        for msg in run.observed.values()
        if msg["is_observed"]
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def _pairs(
    values: Mapping[str, Tensor],
    names: list[str],
    log_probs: Callable[[Mapping[str, Tensor]], Tensor],
) -> set[tuple[str, str]]:
    leaves = {name: values[name].detach().requires_grad_() for name in names}
    with torch.enable_grad():
        at = log_probs({**values, **leaves})
        weights = normal_numbers(at.shape, len(names)).to(at)
        gradients = torch.autograd.grad(
            (at * weights).sum(), list(leaves.values()), allow_unused=True
        )
    scored = {
        name: values[name] * g
        for (name, g) in zip(names, gradients, strict=True)
        if g is not None and bool(g.isfinite().all()) and bool(g.any())
    }
    del leaves, gradients
    at, tried = at.detach(), dict[tuple[tuple[str, str], int, int, str, str], bool]()
    with torch.no_grad():
        for a, b in _agreeing([slices for name in scored for slices in _slices(name, scored)]):
            # of all slices first, and then not of a part of them again
            key = (a.site, b.site), a.dim, b.dim, a.bias, b.bias
            if (
                key not in tried
                and len(tried) < _TRIES
                and key[0] not in {k[0] for k, multiply in tried.items() if multiply}
            ):
                tried[key] = _multiply(a, b, values, at, log_probs)
    return {key[0] for key, multiply in tried.items() if multiply}


def _slices(name: str, scored: Mapping[str, Tensor]) -> Iterator[Slices]:
    """All slices of a site whose scores are not nothing beside those of its entries."""
    score = scored[name]
    noise = 1e-5 * float(score.abs().sum())
    yield Slices(name, -1, 0, 1, "", score.sum().view(1))
    bias = f"{name.removesuffix('weight')}bias" if name.endswith("weight") else ""
    for dim in range(score.ndim):
        sums = score.movedim(dim, 0).flatten(1).sum(1) if score.ndim > 1 else score
        with_bias = (
            [(bias, sums + scored[bias])]
            if bias in scored and scored[bias].shape == sums.shape
            else []
        )
        for with_, total in [*with_bias, ("", sums)]:
            for parts in _PARTS:
                length, left = divmod(len(total), parts)
                if (
                    left == 0
                    and (parts == 1 or (score.ndim > 1 and length > 1))
                    and float(total.abs().max()) > noise
                ):
                    for k, part in enumerate(total.split(length)):
                        yield Slices(name, dim, k * length, length, with_, part)


def _agreeing(slices: list[Slices]) -> Iterator[tuple[Slices, Slices]]:
    """The pairs of slices with the same scores; longest first. The whole of a site is compared with
    sites of one number alone.
    """
    lengths: dict[int, list[Slices]] = {}
    for one in slices:
        lengths.setdefault(one.length, []).append(one)
    for length in sorted(lengths, reverse=True):
        same = lengths[length]
        scores = torch.stack([s.scores for s in same])
        size = scores.abs().amax(1)
        first = scores[:, :8]  # enough to tell nearly all apart
        near = (first[:, None] - first).abs().amax(-1) <= _AGREE * torch.maximum(
            size[:, None], size
        )
        for i, j in near.triu(1).nonzero().tolist():
            a, b = same[i], same[j]
            overlap = a.site == b.site and (a.dim != b.dim or a.start == b.start or length == 1)
            if not overlap and float((scores[i] - scores[j]).abs().max()) <= _AGREE * float(
                torch.maximum(size[i], size[j])
            ):
                yield a, b


def _multiply(
    a: Slices,
    b: Slices,
    values: Mapping[str, Tensor],
    at: Tensor,
    log_probs: Callable[[Mapping[str, Tensor]], Tensor],
) -> bool:
    """Whether (c·a, b/c) gives what (a, b) gives, with a negative c for each slice, and (c·a, b)
    does not.
    """
    generator = torch.Generator().manual_seed(a.length)
    uniform = torch.rand(a.length, generator=generator, device="cpu")
    factors = -(2 ** (1 + uniform)).to(at)
    one = _times(a, factors, values)
    alone = float((log_probs(one) - at).abs().max())
    both = float((log_probs(_times(b, 1 / factors, one)) - at).abs().max())
    return both <= _SAME * alone and alone > 1e-4 * float(at.abs().max())


def _times(slices: Slices, factors: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    changed = dict(values)
    for name, dim in ((slices.site, slices.dim), (slices.bias, 0)):
        if name:
            changed[name] = values[name].clone()
            part = (
                changed[name]
                if dim < 0
                else changed[name].narrow(dim, slices.start, slices.length).movedim(dim, -1)
            )
            part.mul_(factors.to(part) if part.ndim else factors[0])
    return changed
