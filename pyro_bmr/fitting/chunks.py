"""The flat vectors of the fast step, cut into chunks that stay in the cache.

Owns `Chunk`, `chunks_of`, `pull_of`, `log_scale_gradient` and `number_tensor`. Next:
`flat_vectors.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bmr.fitting.site_prior import Pull, SitePrior

_CHUNK = 1 << 17  # numbers; an operation on fewer costs nearly as much in itself as in its numbers


class Chunk(NamedTuple):
    """A stretch of the flat vectors: a part of one site, or several small sites.

    `here` is its place in the one site, `part` its place in the vectors. `loc`, `log_scale`, `std`
    and `draw` are views of the vectors; `scratch` is room for one intermediate.
    """

    names: tuple[str, ...]
    here: slice
    part: slice
    loc: Tensor
    log_scale: Tensor
    std: Tensor
    draw: Tensor
    scratch: Tensor


def chunks_of(
    parts: Mapping[str, slice], loc: Tensor, log_scale: Tensor, std: Tensor, draw: Tensor
) -> list[Chunk]:
    """The chunks of the vectors, in which site `name` has the entries `parts[name]`."""
    size = _CHUNK if loc.device.type == "cpu" else max(loc.numel(), 1)
    scratch = std.new_empty(min(size, loc.numel()))
    chunks = []
    for names, a, b in _stretches(parts, size):
        first = parts[names[0]].start
        mean, log_s, s, z = (vector.detach()[a:b] for vector in (loc, log_scale, std, draw))
        here = slice(a - first, b - first)
        chunks.append(Chunk(names, here, slice(a, b), mean, log_s, s, z, scratch[: b - a]))
    return chunks


def sizes_of(chunk: Chunk, parts: Mapping[str, slice]) -> list[int]:
    """How many entries each site of the chunk has."""
    return [parts[name].stop - parts[name].start for name in chunk.names]


def pull_of(chunk: Chunk, priors: list[SitePrior], parts: Mapping[str, slice]) -> Pull:
    """The prior of the entries of a chunk, whose sites have `priors`: numbers where all of them
    share these.
    """
    of_sites = [(p.loc, p.weight * p.precision, p.weight) for p in priors]
    if len(chunk.names) == 1:
        loc, precision, weight = of_sites[0]
        return Pull(_at(loc, chunk.here), _at(precision, chunk.here), weight)
    sizes, like = sizes_of(chunk, parts), chunk.std
    columns = [
        (
            values[0]
            if all(isinstance(v, float) and v == values[0] for v in values)
            else torch.cat(
                [
                    torch.as_tensor(v, dtype=like.dtype, device=like.device).expand(size)
                    for v, size in zip(values, sizes, strict=True)
                ]
            )
        )
        for values in zip(*of_sites, strict=True)
    ]
    return Pull(*columns)


def log_scale_gradient(
    chunk: Chunk,
    odd: Tensor,
    noise: Tensor,
    sign: float,
    pull: Pull,
    kl_weight: float,
    out: Tensor,
) -> Tensor:
    r"""The gradient of the loss by log σ at the draw μ + `sign` · σε, in `out`.

    .. math:: \sigma\left(g\varepsilon + \lambda p \sigma\right) - \lambda n

    Here g is the gradient `odd`, λ the `kl_weight`; p and n are the precision and the weight of the
    `pull`. It uses the scratch of the chunk; `out` may be that, or σ.
    """
    share = -kl_weight * pull.weight
    constant = number_tensor(share, out) if isinstance(share, float) else share
    if isinstance(pull.precision, float) and pull.precision == 0:
        inner = torch.mul(odd, noise, out=chunk.scratch)
    else:
        inner = torch.mul(chunk.std, kl_weight * pull.precision, out=chunk.scratch)
        inner, sign = inner.addcmul_(odd, noise, value=sign), 1.0
    return torch.addcmul(constant, chunk.std, inner, value=sign, out=out)


def number_tensor(value: float, like: Tensor) -> Tensor:
    """A tensor with one number, of the dtype and on the device of `like`."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _at(values: float | Tensor, here: slice) -> float | Tensor:
    """A number, or a part of one number per entry."""
    return values if isinstance(values, float) else values[here]


def _stretches(parts: Mapping[str, slice], size: int) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """Cuts the flat vectors into stretches of at most `size` numbers: the sites' names, the start
    and the end. Small neighbours go together.
    """
    together: list[str] = []
    for name, part in [*parts.items(), ("", slice(0, _CHUNK + 1))]:
        large = part.stop - part.start > _CHUNK
        if together and (large or part.stop - parts[together[0]].start > _CHUNK):
            yield tuple(together), parts[together[0]].start, parts[together[-1]].stop
            together = []
        if name and large:
            for a in range(part.start, part.stop, size):
                yield (name,), a, min(a + size, part.stop)
        elif name and part.stop > part.start:
            together.append(name)
