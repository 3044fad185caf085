"""One step of a `MeanField` fit: the draw, the gradient of the loss and the two terms of the ELBO,
in few passes over the weights.

Owns `MeanFieldStep`. `elbo.elbo_terms` gives the same numbers through autograd, for any guide;
tests hold the two together. Here autograd runs from the loss to the drawn weights only. The rest is
written out, in chunks that stay in the cache. Next: `natural_gradient.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_bmr.errors import ModelError
from pyro_bmr.fitting.noise import Noise
from pyro_bmr.guides import MeanField
from pyro_bmr.guides.mean_field import Latent, base_distribution, gaussian_on_the_line
from pyro_bmr.tracing import Values, collapsed, does_not_split, likelihood_of

_CHUNK = 1 << 16  # numbers; a few such vectors fit into a core's second-level cache
# a guide with more numbers evaluates its KL, a slow quantity that is only reported, in every eighth
# step
_LARGE, _KL_EVERY = 10_000, 8


class SitePrior(NamedTuple):
    """N(`loc`, 1/`precision`) on the unconstrained scale, each a number or flat over the living
    entries; `precision` 0 where the prior has no closed form.

    `log_scales` is Σ log s over those entries, `weight` how often the program counts the site.
    """

    loc: float | Tensor
    precision: float | Tensor
    log_scales: float
    weight: float


class Pull(NamedTuple):
    """The prior of a chunk: its mean η, its precision times how often the program counts the site,
    and that count, each a number or one per entry.
    """

    loc: float | Tensor
    precision: float | Tensor
    weight: float | Tensor

    def add_to(self, g: Tensor, loc: Tensor, factor: float, out: Tensor) -> Tensor:
        """g + factor · p (μ − η), the gradient of a mean with the pull of its prior."""
        if isinstance(self.precision, float) and isinstance(self.loc, float):
            torch.add(g, loc, alpha=factor * self.precision, out=out)
            return out.sub_(factor * self.precision * self.loc) if self.loc else out
        return torch.add(g, (loc - self.loc) * self.precision, alpha=factor, out=out)

    def halfway(self, other: Pull) -> Pull:
        """The prior whose pull is the mean of both, wherever the mean and the standard deviation of
        the entries are.
        """
        precision, weight = (self.precision + other.precision) / 2, (self.weight + other.weight) / 2
        total = (
            (2 * precision).clamp_min(torch.finfo(precision.dtype).tiny)
            if isinstance(precision, Tensor)
            else 2 * precision or 1.0
        )
        return Pull(
            (self.precision * self.loc + other.precision * other.loc) / total, precision, weight
        )


class Draw(NamedTuple):
    """What one run gives: both terms of the ELBO in nats (the closed part of `kl` may be up to
    eight steps old), and per chunk the prior and the gradient g.

    `gradients` is g as the mean has it, `odd` g as it multiplies the noise: the same at one draw,
    half the sum and half the difference at two with opposite signs.
    """

    expected_log_likelihood: float
    kl: float
    gradients: list[Tensor]
    odd: list[Tensor]
    pulls: list[Pull]
    noise: Tensor
    sign: float


class Chunk(NamedTuple):
    """A stretch of the flat vectors, a part of one site or several small sites: its place in the
    one site and in the vectors, views of these, and room for one intermediate.
    """

    names: tuple[str, ...]
    here: slice
    part: slice
    loc: Tensor
    log_scale: Tensor
    std: Tensor
    draw: Tensor
    scratch: Tensor


class Network(Protocol):
    """A program that can be run given its weights; see `BayesianNetwork`, which is one."""

    plain_weights: set[str]
    has_log_likelihood: bool

    def log_likelihood(self, weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor: ...


class MeanFieldStep:
    r"""The gradient of (T·KL − E[log p(y|θ)])/N at one draw, for the flat vectors `loc` and
    `log_scale`.

    With g the gradient, at the draw z = μ + σε, of everything that has no closed form, and η, p the
    mean and precision of the prior:

    .. math:: \nabla_\mu = g + \tfrac{T}{N}\, p (\mu - \eta), \qquad
        \nabla_{\log\sigma} = \sigma\left(g\varepsilon + \tfrac{T}{N}\,
        p\sigma\right) - \tfrac{T}{N}

    The vectors are the guide's own until `prune` is called; then they hold the living entries
    alone, and a step costs what lives. `write_back` brings the guide up to date.

    With the estimator "antithetic" a run takes two draws, μ ± σε. Their mean gradient of μ has no
    part that is odd in ε, the largest part of its noise.

    With a `network` (the `BayesianNetwork` inside `program`) its plain weights are declared in the
    first run alone. After that the network gets them as they are drawn, and where it has no other
    sites, only its likelihood is run. `forget` has them declared again, as after a change of the
    empirical scales.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        guide: MeanField,
        rows: int,
        temperature: float,
        seed: int,
        network: Network | None = None,
    ) -> None:
        self.program, self.guide, self.rows, self.kl_weight = (
            program,
            guide,
            rows,
            temperature / rows,
        )
        self.seed, self.network = seed, network
        self.loc, self.log_scale = guide.loc, guide.log_scale
        # site → its living entries, flat; None for all
        self.living: dict[str, Tensor] | None = None
        self.declared: dict[str, SitePrior] = {}
        self.priors: dict[str, SitePrior] = {}
        self.pulls: list[Pull] = []
        self.kl = 0.0
        self._lay_out()

    def _lay_out(self) -> None:
        latents = self.guide.latents
        sizes = (
            self.guide.sizes
            if self.living is None
            else [len(self.living[latent.name]) for latent in latents]
        )
        ends = list(accumulate(sizes, initial=0))
        self.parts = {
            latent.name: slice(a, b)
            for latent, a, b in zip(latents, ends[:-1], ends[1:], strict=True)
        }
        self.std = torch.empty_like(self.log_scale.detach())
        self.draw = torch.empty_like(self.std)
        self.dense = self.guide.views(
            self.draw if self.living is None else self.draw.new_zeros(self.guide.loc.numel())
        )
        self.leaves = {name: view.detach().requires_grad_() for name, view in self.dense.items()}
        chunk = _CHUNK if self.loc.device.type == "cpu" else max(self.loc.numel(), 1)
        scratch = self.std.new_empty(min(chunk, self.loc.numel()))
        self.chunks = []
        for names, a, b in _stretches(self.parts, chunk):
            loc, log_scale, std, draw = (
                vector.detach()[a:b] for vector in (self.loc, self.log_scale, self.std, self.draw)
            )
            first = self.parts[names[0]].start
            self.chunks.append(
                Chunk(
                    names,
                    slice(a - first, b - first),
                    slice(a, b),
                    loc,
                    log_scale,
                    std,
                    draw,
                    scratch[: b - a],
                )
            )
        self.stale = [True] * len(self.chunks)  # where `std` is not that of `log_scale`
        self.noise = Noise(self.std, self.seed)
        self.declared = {}

    def forget(self) -> None:
        """Has every site declared again in the next run."""
        self.declared = {}

    @torch.no_grad()
    def run(self, args: tuple[Any, ...], number: int) -> Draw:
        """The draw of step `number`. Trained tensors of the program that are no sites get their
        `.grad`.
        """
        noise, sign = self.noise.at(number)
        if self.guide.estimator != "antithetic":
            return self._at(args, number, noise, sign, 1.0)
        one, other = (self._at(args, number, noise, s, 0.5) for s in (sign, -sign))
        odd = [a - b for a, b in zip(one.gradients, other.gradients, strict=True)]
        even = [a.add_(b) for a, b in zip(one.gradients, other.gradients, strict=True)]
        pulls = (
            one.pulls
            if one.pulls is other.pulls
            else [a.halfway(b) for a, b in zip(one.pulls, other.pulls, strict=True)]
        )
        likelihood, kl = (
            (one.expected_log_likelihood + other.expected_log_likelihood) / 2,
            (one.kl + other.kl) / 2,
        )
        return Draw(likelihood, kl, even, odd, pulls, noise, sign)

    def _at(
        self, args: tuple[Any, ...], number: int, noise: Tensor, sign: float, share: float
    ) -> Draw:
        """One draw, whose gradients are multiplied by `share`."""
        for k, chunk in enumerate(self.chunks):
            if self.stale[k]:
                torch.exp(chunk.log_scale, out=chunk.std)
                self.stale[k] = False
            torch.addcmul(chunk.loc, chunk.std, noise[chunk.part], value=sign, out=chunk.draw)
        if self.living is not None:
            for name, living in self.living.items():
                self.dense[name].view(-1).scatter_(0, living, self.draw[self.parts[name]])
        with torch.enable_grad():
            if (
                self.network is not None
                and len(self.declared) == len(self.parts)
                and self.network.has_log_likelihood
            ):
                likelihood, priors, open_kl = (
                    self.network.log_likelihood(self.leaves, *args) * (self.rows / len(args[0])),
                    self.declared,
                    0.0,
                )
                (likelihood * (-share / self.rows)).backward()
            else:
                likelihood, priors, open_kl = self._run_program(args, share)
        if not self.loc.numel() > _LARGE or number % _KL_EVERY == 0 or priors is not self.priors:
            self.kl = sum(self._closed_kl(name, prior, noise) for name, prior in priors.items())
        self._follow(priors)
        by_site = {name: self._gradient(name) for name in self.parts}
        gradients = [
            (
                by_site[c.names[0]][c.here]
                if len(c.names) == 1
                else torch.cat([by_site[name] for name in c.names])
            )
            for c in self.chunks
        ]
        return Draw(
            float(likelihood.detach()),
            open_kl + self.kl,
            gradients,
            gradients,
            self.pulls,
            noise,
            sign,
        )

    def _follow(self, priors: dict[str, SitePrior]) -> None:
        if priors is not self.priors:
            self.pulls = [
                self._pull(chunk, [priors[name] for name in chunk.names]) for chunk in self.chunks
            ]
        self.priors = priors

    def _pull(self, chunk: Chunk, priors: list[SitePrior]) -> Pull:
        """The prior of the entries of a chunk: numbers where all of them share these."""
        of_sites = [(p.loc, p.weight * p.precision, p.weight) for p in priors]
        if len(chunk.names) == 1:
            loc, precision, weight = of_sites[0]
            return Pull(_at(loc, chunk.here), _at(precision, chunk.here), weight)
        sizes = [self.parts[name].stop - self.parts[name].start for name in chunk.names]
        columns = [
            (
                values[0]
                if all(isinstance(v, float) and v == values[0] for v in values)
                else torch.cat(
                    [
                        torch.as_tensor(v, dtype=self.std.dtype, device=self.std.device).expand(
                            size
                        )
                        for v, size in zip(values, sizes, strict=True)
                    ]
                )
            )
            for values in zip(*of_sites, strict=True)
        ]
        return Pull(*columns)

    def names(self, draw: Draw) -> dict[str, Tensor]:
        """Site → what of g lies in its chunks."""
        named: dict[str, Tensor] = {}
        for chunk, g in zip(self.chunks, draw.gradients, strict=True):
            parts = (
                [g]
                if len(chunk.names) == 1
                else g.split(
                    [self.parts[name].stop - self.parts[name].start for name in chunk.names]
                )
            )
            for name, part in zip(chunk.names, parts, strict=True):
                named[name] = torch.cat([named[name], part]) if name in named else part
        return named

    def _run_program(
        self, args: tuple[Any, ...], share: float
    ) -> tuple[Tensor, dict[str, SitePrior], float]:
        """The whole program but for the weights that are known, and the backward pass."""
        values = {
            s.name: self.leaves[s.name] if s.transform is None else s.transform(self.leaves[s.name])
            for s in self.guide.latents
        }
        with Values(values) as run:
            if self.declared:
                self.program(*args, weights={name: values[name] for name in self.declared})
            else:
                self.program(*args)
        likelihood = likelihood_of(run)
        loss = likelihood / -self.rows
        priors: dict[str, SitePrior] = {}
        open_kl, moving = 0.0, False
        for latent in self.guide.latents:
            if latent.name in self.declared:
                priors[latent.name] = self.declared[latent.name]
                continue
            msg = run.latent.get(latent.name)
            if msg is None:
                raise ModelError(
                    f"site '{latent.name}': the program has it for some batches or draws only; give"
                    " it a place in every run"
                )
            priors[latent.name], counted, uncounted = self._prior(latent, msg, values[latent.name])
            if counted is not None:
                loss, open_kl = loss + self.kl_weight * counted, open_kl + float(counted.detach())
            if uncounted is not None:
                loss, moving = loss + self.kl_weight * uncounted, True
        if loss.requires_grad:  # not if the data say nothing of the sites
            (share * loss).backward()  # type: ignore[no-untyped-call]
        if self.network is not None and not self.declared and not moving:
            self.declared = {
                name: prior for name, prior in priors.items() if name in self.network.plain_weights
            }
        return likelihood, priors, open_kl

    def _prior(
        self, latent: Latent, msg: Any, value: Tensor
    ) -> tuple[SitePrior, Tensor | None, Tensor | None]:
        """The prior of a site; its part of the KL if that has no closed form; and what the loss
        alone needs if the moments depend on other sites.
        """
        name, weight = latent.name, float(msg["scale"])
        base = base_distribution(msg["fn"])
        # a program under `pruning.Masked`
        base = base.base_dist if hasattr(base, "kept") else base
        gaussian = gaussian_on_the_line(base, latent.transform)
        if gaussian is None:
            log_p = base.log_prob(value)
            if (
                base.event_shape
                and self.living is not None
                and len(self.living[name]) < value.numel()
            ):
                raise ModelError(does_not_split(name, base))
            if latent.transform is not None:
                jacobian = latent.transform.log_abs_det_jacobian(self.leaves[name], value)
                log_p = log_p + (
                    jacobian.flatten(-len(base.event_shape)).sum(-1)
                    if base.event_shape
                    else jacobian
                )
            log_p = log_p if base.event_shape else self._alive(name, log_p, value.shape)
            return SitePrior(0.0, 0.0, 0.0, weight), -weight * log_p.sum(), None
        mean, scale = (
            t if t.ndim == 0 else self._alive(name, t, value.shape)
            for t in (collapsed(gaussian.loc), collapsed(gaussian.scale))
        )
        part = self.parts[name]
        uncounted = None
        if mean.requires_grad or scale.requires_grad:
            ratio = (
                (self.loc.detach()[part] - mean).square() + self.std[part].square()
            ) / scale.square()
            uncounted = weight * (scale.log().expand(ratio.shape) + 0.5 * ratio).sum()
        eta, s = mean.detach(), scale.detach()
        log_scales = (
            float(s.log()) * (part.stop - part.start) if s.ndim == 0 else float(s.log().sum())
        )
        prior = SitePrior(
            float(eta) if eta.ndim == 0 else eta,
            float(s) ** -2 if s.ndim == 0 else s.square().reciprocal(),
            log_scales,
            weight,
        )
        return prior, None, uncounted

    def _alive(self, name: str, values: Tensor, shape: torch.Size) -> Tensor:
        flat = values.expand(shape).reshape(-1)
        return flat if self.living is None else flat[self.living[name]]

    def _closed_kl(self, name: str, prior: SitePrior, noise: Tensor) -> float:
        part = self.parts[name]
        size, log_scales = part.stop - part.start, float(self.log_scale[part].sum())
        if isinstance(prior.precision, float) and prior.precision == 0:  # log q alone
            return -prior.weight * (
                log_scales
                + 0.5 * float(noise[part].square().sum())
                + 0.5 * size * math.log(2 * math.pi)
            )
        loc, std = self.loc.detach()[part], self.std[part]
        deviation = loc if isinstance(prior.loc, float) and prior.loc == 0 else loc - prior.loc
        if isinstance(prior.precision, float):
            ratio = prior.precision * (
                float(torch.dot(deviation, deviation)) + float(torch.dot(std, std))
            )
        else:
            ratio = float(((deviation.square() + std.square()) * prior.precision).sum())
        return prior.weight * (prior.log_scales - log_scales + 0.5 * (ratio - size))

    def _gradient(self, name: str) -> Tensor:
        leaf = self.leaves[name]
        part = self.parts[name]
        if leaf.grad is None:
            return self.draw.new_zeros(part.stop - part.start)
        flat, leaf.grad = leaf.grad.reshape(-1), None
        return flat if self.living is None else flat.index_select(0, self.living[name])

    def times_noise(self, draw: Draw) -> list[Tensor]:
        """Per chunk g ε, the gradient of a standard deviation."""
        return [
            odd * draw.noise[chunk.part] * draw.sign
            for chunk, odd in zip(self.chunks, draw.odd, strict=True)
        ]

    @torch.no_grad()
    def write_gradients(self, draw: Draw) -> None:
        """The gradient of the loss in `loc.grad` and `log_scale.grad`, for any optimiser. It takes
        the place of the draw: one call per run.
        """
        for chunk, g, odd, pull in zip(
            self.chunks, draw.gradients, draw.odd, draw.pulls, strict=True
        ):
            inner = torch.mul(chunk.std, self.kl_weight * pull.precision, out=chunk.scratch)
            chunk.std.mul_(inner.addcmul_(odd, draw.noise[chunk.part], value=draw.sign)).sub_(
                self.kl_weight * pull.weight
            )
            pull.add_to(g, chunk.loc, self.kl_weight, chunk.draw)
        self.stale = [True] * len(self.chunks)
        self.loc.grad, self.log_scale.grad = self.draw, self.std

    @torch.no_grad()
    def prune(self, masks: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
        """Keeps the entries that live by `masks` (site → bool tensor) alone, in the vectors and in
        the state of `optimizer`.
        """
        stays: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            now = None if self.living is None else self.living[name]
            flat = masks[name].reshape(-1) if name in masks else None
            everything = self.loc.new_ones(part.stop - part.start, dtype=torch.bool)
            stays[name] = everything if flat is None else flat if now is None else flat[now]
        kept = torch.cat(list(stays.values()))
        if bool(kept.all()):
            return
        self.write_back()
        self.living = {
            name: stay.nonzero()[:, 0] if self.living is None else self.living[name][stay]
            for name, stay in stays.items()
        }
        self.loc, self.log_scale = (
            _replaced(flat, kept, optimizer) for flat in (self.loc, self.log_scale)
        )
        self._lay_out()

    def state(self) -> dict[str, Any]:
        """What the steps so far have changed, for a checkpoint. The KL is up to eight steps old,
        and is evaluated anew when the declared priors change.
        """
        declared = {name: tuple(prior) for name, prior in self.declared.items()}
        return {
            "loc": self.loc,
            "log_scale": self.log_scale,
            "kl": self.kl,
            "declared": declared,
            "settled": self.priors is self.declared,
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`, after `prune` with its masks."""
        self.loc.copy_(state["loc"])
        self.log_scale.copy_(state["log_scale"])
        self.stale = [True] * len(self.chunks)
        self.kl = state["kl"]
        device = self.loc.device
        self.declared = {
            n: SitePrior._make(v.to(device) if isinstance(v, Tensor) else v for v in prior)
            for n, prior in state["declared"].items()
        }
        if state["settled"]:
            self._follow(self.declared)

    @torch.no_grad()
    def write_back(self) -> None:
        """The guide's vectors as the fit has them now; pruned entries stay as they were when they
        were pruned.
        """
        if self.living is not None:
            for flat, compact in (
                (self.guide.loc, self.loc),
                (self.guide.log_scale, self.log_scale),
            ):
                for name, view in self.guide.views(flat.detach()).items():
                    view.view(-1).scatter_(0, self.living[name], compact[self.parts[name]])


def _at(values: float | Tensor, here: slice) -> float | Tensor:
    """A number, or a part of one number per entry."""
    return values if isinstance(values, float) else values[here]


def _stretches(
    parts: Mapping[str, slice], chunk: int
) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """Cuts the flat vectors into stretches of at most `chunk` numbers: the sites' names, the start
    and the end. Small neighbours go together.
    """
    together: list[str] = []
    for name, part in [*parts.items(), ("", slice(0, _CHUNK + 1))]:
        large = part.stop - part.start > _CHUNK
        if together and (large or part.stop - parts[together[0]].start > _CHUNK):
            yield tuple(together), parts[together[0]].start, parts[together[-1]].stop
            together = []
        if name and large:
            for a in range(part.start, part.stop, chunk):
                yield (name,), a, min(a + chunk, part.stop)
        elif name and part.stop > part.start:
            together.append(name)


def _replaced(flat: nn.Parameter, kept: Tensor, optimizer: Optimizer | None) -> nn.Parameter:
    """The entries of a parameter where `kept` is true as a new one, which takes its place in an
    optimiser, state included.
    """
    compact = nn.Parameter(flat.detach()[kept])
    if optimizer is None:
        return compact
    for group in optimizer.param_groups:
        group["params"] = [compact if p is flat else p for p in group["params"]]
    state = optimizer.state.pop(flat, None)
    if state is not None:
        optimizer.state[compact] = {
            k: v[kept] if isinstance(v, Tensor) and v.shape == flat.shape else v
            for k, v in state.items()
        }
    return compact
