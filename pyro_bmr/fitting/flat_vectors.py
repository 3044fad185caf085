"""The two vectors of a `MeanField` fit: where each site lies in them, what a step fills, and how
pruned entries are taken out.

Owns `FlatVectors`. Next: `step.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, groupby

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_bmr.fitting.chunks import chunks_of, sizes_of
from pyro_bmr.guides import MeanField

# after so many steps, a guide of more numbers takes its standard deviations anew once in four
_FIRST, _LARGE, _PERIOD = 500, 10_000, 4


class FlatVectors:
    """`loc` and `log_scale` of a guide, and the vectors that a step fills: `std` and the `draw`.

    They are the guide's own until entries are taken out. `parts`: the place of each site in them.
    `leaves`: the draw of each site in its shape, with 0 at pruned entries, as autograd knows it;
    views of `whole_draw`.
    `kept`: the indices of the kept entries of each site; None for all. `stale`: the chunks whose
    `std` the next step takes anew, as exp(`log_scale`).
    """

    def __init__(self, guide: MeanField) -> None:
        self.guide = guide
        self.loc, self.log_scale = guide.loc, guide.log_scale
        self.kept: dict[str, Tensor] | None = None
        self._lay_out()

    def _lay_out(self) -> None:
        """Places the sites in the vectors, and makes the vectors that a step fills."""
        names = [latent.name for latent in self.guide.latents]
        sizes = self.guide.sizes if self.kept is None else [len(self.kept[n]) for n in names]
        ends = list(accumulate(sizes, initial=0))
        self.parts = {
            name: slice(a, b) for name, a, b in zip(names, ends[:-1], ends[1:], strict=True)
        }
        self.std = torch.empty_like(self.log_scale.detach())
        self.draw = torch.empty_like(self.std)
        self.whole_draw = (
            self.draw if self.kept is None else self.draw.new_zeros(self.guide.loc.numel())
        )
        self.dense = self.guide.views(self.whole_draw)
        self.leaves = {name: view.detach().requires_grad_() for name, view in self.dense.items()}
        self.chunks = chunks_of(self.parts, self.loc, self.log_scale, self.std, self.draw)
        self.sizes = [len(chunk.loc) for chunk in self.chunks]
        self.runs = [
            (names, [len(chunk.loc) for chunk in run])
            for names, run in groupby(self.chunks, lambda chunk: chunk.names)
        ]
        self.stale = [True] * len(self.chunks)

    def period(self, steps: int) -> int:
        """In how many steps a chunk takes its standard deviations anew, after `steps` updates."""
        return _PERIOD if steps > _FIRST and self.loc.numel() > _LARGE else 1

    def release(self) -> None:
        """Frees the memory of the vectors that a step fills, until it fills them again. What views
        them stays as it is.
        """
        self.loc.grad = self.log_scale.grad = None
        self.stale = [True] * len(self.chunks)
        for vector in (self.std, self.draw, self.whole_draw):
            vector.untyped_storage().resize_(0)

    def fill(self, noise: Tensor, sign: float) -> None:
        """Sets the draw to μ + σ · `sign` · `noise`."""
        if self.std.untyped_storage().nbytes() == 0:
            for vector in (self.std, self.draw, self.whole_draw):
                vector.untyped_storage().resize_(vector.numel() * vector.element_size())
            if self.whole_draw is not self.draw:
                self.whole_draw.zero_()
        for k, (chunk, own) in enumerate(zip(self.chunks, noise.split(self.sizes), strict=True)):
            if self.stale[k]:
                torch.exp(chunk.log_scale, out=chunk.std)
                self.stale[k] = False
            torch.addcmul(chunk.loc, chunk.std, own, value=sign, out=chunk.draw)

    def scatter(self) -> None:
        """Puts the draw of the kept entries into the leaves, if they have others."""
        for name, kept in (self.kept or {}).items():
            self.dense[name].view(-1).scatter_(0, kept, self.draw[self.parts[name]])

    def gradients(self, found: Mapping[str, Tensor]) -> list[Tensor]:
        """The gradient g of each chunk: what is `found` of a site, else taken out of its leaf."""
        by_site = {
            name: found[name] if name in found else self._gradient(name) for name in self.parts
        }
        gradients: list[Tensor] = []
        for names, sizes in self.runs:
            each = [by_site[name] for name in names]
            flat = each[0] if len(each) == 1 else torch.cat(each)
            gradients += [flat] if len(sizes) == 1 else flat.split(sizes)
        return gradients

    def _gradient(self, name: str) -> Tensor:
        leaf = self.leaves[name]
        if leaf.grad is None:
            part = self.parts[name]
            return self.draw.new_zeros(part.stop - part.start)
        flat, leaf.grad = leaf.grad.reshape(-1), None
        return flat if self.kept is None else flat.index_select(0, self.kept[name])

    def mask_of(self, name: str) -> Tensor:
        """Which entries of a site are kept, in its shape."""
        mask = torch.ones_like(self.leaves[name], dtype=torch.bool, requires_grad=False)
        if self.kept is not None:
            mask = torch.zeros_like(mask)
            mask.view(-1)[self.kept[name]] = True
        return mask

    @torch.no_grad()
    def take_out(self, masks: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> bool:
        """Leaves the entries that `masks` (site → bool tensor) keep, in the vectors and in the
        state of `optimizer`. Returns whether any entry was taken out.
        """
        still: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            now = None if self.kept is None else self.kept[name]
            mask = masks[name].reshape(-1) if name in masks else None
            everything = self.loc.new_ones(part.stop - part.start, dtype=torch.bool)
            still[name] = everything if mask is None else mask if now is None else mask[now]
        kept = torch.cat(list(still.values()))
        if bool(kept.all()):
            return False
        self.write_back()
        self.kept = {
            name: mask.nonzero()[:, 0] if self.kept is None else self.kept[name][mask]
            for name, mask in still.items()
        }
        index = kept.nonzero()[:, 0]
        self.loc = _kept_entries(self.loc, index, optimizer)
        self.log_scale = _kept_entries(self.log_scale, index, optimizer)
        self._lay_out()
        return True

    @torch.no_grad()
    def write_back(self) -> None:
        """Gives the guide the vectors as the fit has them now; pruned entries keep the values that
        they had when they were pruned.
        """
        if self.kept is not None:
            for flat, compact in (
                (self.guide.loc, self.loc),
                (self.guide.log_scale, self.log_scale),
            ):
                for name, view in self.guide.views(flat.detach()).items():
                    view.view(-1).scatter_(0, self.kept[name], compact[self.parts[name]])

    def not_finite_with(self, gradients: list[Tensor]) -> set[str]:
        """The sites whose moments or gradients, one a chunk, are not finite."""
        by_site: dict[str, list[Tensor]] = {
            name: [self.loc.detach()[part] + self.log_scale.detach()[part]]
            for name, part in self.parts.items()
        }
        for chunk, g in zip(self.chunks, gradients, strict=True):
            sizes = [len(g)] if len(chunk.names) == 1 else sizes_of(chunk, self.parts)
            for name, part in zip(chunk.names, g.split(sizes), strict=True):
                by_site[name].append(part)
        return {
            name
            for name, values in by_site.items()
            if not all(bool(v.isfinite().all()) for v in values)
        }


def _kept_entries(flat: nn.Parameter, kept: Tensor, optimizer: Optimizer | None) -> nn.Parameter:
    """The entries of a parameter with the numbers `kept`, as a new parameter, which takes the place
    of the old one in an optimiser, state included.
    """
    compact = nn.Parameter(flat.detach().index_select(0, kept))
    if optimizer is None:
        return compact
    for group in optimizer.param_groups:
        group["params"] = [compact if p is flat else p for p in group["params"]]
    state = optimizer.state.pop(flat, None)
    if state is not None:
        optimizer.state[compact] = {
            k: v.index_select(0, kept) if isinstance(v, Tensor) and v.shape == flat.shape else v
            for k, v in state.items()
        }
    return compact
