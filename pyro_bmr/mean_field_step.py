"""One step of a `MeanField` fit: the draw, the gradient of the loss and the two terms of the ELBO, in few passes over the weights.

Owns `MeanFieldStep` and its `Noise`. `elbo.elbo_terms` gives the same numbers through autograd, for any guide; tests hold the two together. Here autograd
runs from the loss to the drawn weights only. The rest is written out, in chunks that stay in the cache. Next: `online_newton.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_bmr.elbo import Values, collapsed, does_not_split, likelihood_of
from pyro_bmr.errors import ModelError
from pyro_bmr.guides import MeanField
from pyro_bmr.guides.mean_field import Latent, base_distribution, gaussian_on_the_line

_CHUNK = 1 << 16  # numbers; a few such vectors fit into a core's second-level cache
_STEPS_PER_BATCH, _OFFSETS = 8, 1 << 12
_LARGE, _KL_EVERY = 10_000, 8  # a guide with more numbers evaluates its KL, a slow quantity that is only reported, in every eighth step


class Noise:
    r"""Standard-normal vectors, one per step, as a function of (seed, step).

    A batch of size + 4096 numbers serves eight steps: each takes the window at a random offset of its own, with a random sign. Each step's
    vector is exactly N(0, I), each of its entries is new in every step, and its mean given all earlier steps is exactly 0, so the gradient stays
    unbiased. What the eight steps share is the size of a number, at entries that lie the difference of their offsets apart.
    """

    def __init__(self, like: Tensor, seed: int) -> None:
        self.size, self.seed, self.number = like.numel(), seed, -1
        self.generator, self.choice = torch.Generator(device=like.device), torch.Generator()
        self.batch = torch.empty(self.size + _OFFSETS, dtype=like.dtype, device=like.device)
        self.windows: list[tuple[int, float]] = []

    def at(self, step: int) -> tuple[Tensor, float]:
        """The numbers and the sign of `step`."""
        number, turn = divmod(step, _STEPS_PER_BATCH)
        if number != self.number:
            self.number = number
            self.choice.manual_seed(2 * (self.seed * 1_000_003 + number))
            self.generator.manual_seed(2 * (self.seed * 1_000_003 + number) + 1)
            self.batch.normal_(generator=self.generator)
            offsets = torch.randperm(_OFFSETS, generator=self.choice)[:_STEPS_PER_BATCH].tolist()
            signs = (2.0 * torch.randint(2, (_STEPS_PER_BATCH,), generator=self.choice) - 1).tolist()
            self.windows = list(zip(offsets, signs, strict=True))
        offset, sign = self.windows[turn]
        return self.batch[offset : offset + self.size], sign


class SitePrior(NamedTuple):
    """N(`loc`, 1/`precision`) on the unconstrained scale, each a number or flat over the living entries; `precision` 0 where the prior has no closed form.

    `log_scales` is Σ log s over those entries, `weight` how often the program counts the site.
    """

    loc: float | Tensor
    precision: float | Tensor
    log_scales: float
    weight: float


class Draw(NamedTuple):
    """What one run gives: both terms of the ELBO in nats (the closed part of `kl` may be up to eight steps old), and per site g, flat over the
    living entries, and the prior."""

    expected_log_likelihood: float
    kl: float
    gradients: dict[str, Tensor]
    priors: dict[str, SitePrior]
    noise: Tensor
    sign: float


class Chunk(NamedTuple):
    """A stretch of one site: its place in the site and in the flat vectors, views of these, and room for one intermediate."""

    name: str
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
    r"""The gradient of (T·KL − E[log p(y|θ)])/N at one draw, for the flat vectors `loc` and `log_scale`.

    With g the gradient, at the draw z = μ + σε, of everything that has no closed form, and η, p the mean and precision of the prior:

    .. math:: \nabla_\mu = g + \tfrac{T}{N}\, p (\mu - \eta), \qquad
        \nabla_{\log\sigma} = \sigma\left(g\varepsilon + \tfrac{T}{N}\, p\sigma\right) - \tfrac{T}{N}

    The vectors are the guide's own until `prune` is called; then they hold the living entries alone, and a step costs what lives. `write_back`
    brings the guide up to date.

    With a `network` (the `BayesianNetwork` inside `program`) its plain weights are declared in the first run alone. After that the network gets them as
    they are drawn, and where it has no other sites, only its likelihood is run. `forget` has them declared again, as after a change of the empirical scales.
    """

    def __init__(self, program: Callable[..., Any], guide: MeanField, rows: int, temperature: float, seed: int, network: Network | None = None) -> None:
        self.program, self.guide, self.rows, self.kl_weight = program, guide, rows, temperature / rows
        self.seed, self.network = seed, network
        self.loc, self.log_scale = guide.loc, guide.log_scale
        self.living: dict[str, Tensor] | None = None  # site → its living entries, flat; None for all
        self.declared: dict[str, SitePrior] = {}
        self.priors: dict[str, SitePrior] = {}
        self.kl = 0.0
        self._lay_out()

    def _lay_out(self) -> None:
        latents = self.guide.latents
        sizes = self.guide.sizes if self.living is None else [len(self.living[latent.name]) for latent in latents]
        ends = list(accumulate(sizes, initial=0))
        self.parts = {latent.name: slice(a, b) for latent, a, b in zip(latents, ends[:-1], ends[1:], strict=True)}
        self.std = torch.empty_like(self.log_scale.detach())
        self.draw = torch.empty_like(self.std)
        self.dense = self.guide.views(self.draw if self.living is None else self.draw.new_zeros(self.guide.loc.numel()))
        self.leaves = {name: view.detach().requires_grad_() for name, view in self.dense.items()}
        chunk = _CHUNK if self.loc.device.type == "cpu" else max(self.loc.numel(), 1)
        scratch = self.std.new_empty(min(chunk, self.loc.numel()))
        self.chunks = []
        for name, part in self.parts.items():
            for a in range(part.start, part.stop, chunk):
                b = min(a + chunk, part.stop)
                loc, log_scale, std, draw = (vector.detach()[a:b] for vector in (self.loc, self.log_scale, self.std, self.draw))
                self.chunks.append(Chunk(name, slice(a - part.start, b - part.start), slice(a, b), loc, log_scale, std, draw, scratch[: b - a]))
        self.stale = [True] * len(self.chunks)  # where `std` is not that of `log_scale`
        self.noise = Noise(self.std, self.seed)
        self.declared = {}

    def forget(self) -> None:
        """Has every site declared again in the next run."""
        self.declared = {}

    @torch.no_grad()
    def run(self, args: tuple[Any, ...], number: int) -> Draw:
        """The draw of step `number`. Trained tensors of the program that are no sites get their `.grad`."""
        noise, sign = self.noise.at(number)
        for k, chunk in enumerate(self.chunks):
            if self.stale[k]:
                torch.exp(chunk.log_scale, out=chunk.std)
                self.stale[k] = False
            torch.addcmul(chunk.loc, chunk.std, noise[chunk.part], value=sign, out=chunk.draw)
        if self.living is not None:
            for name, living in self.living.items():
                self.dense[name].view(-1).scatter_(0, living, self.draw[self.parts[name]])
        with torch.enable_grad():
            if self.network is not None and len(self.declared) == len(self.parts) and self.network.has_log_likelihood:
                likelihood, priors, open_kl = self.network.log_likelihood(self.leaves, *args) * (self.rows / len(args[0])), self.declared, 0.0
                (likelihood / -self.rows).backward()
            else:
                likelihood, priors, open_kl = self._run_program(args)
        if not self.loc.numel() > _LARGE or number % _KL_EVERY == 0 or priors is not self.priors:
            self.kl = sum(self._closed_kl(name, prior, noise) for name, prior in priors.items())
        self.priors = priors
        return Draw(float(likelihood.detach()), open_kl + self.kl, {name: self._gradient(name) for name in self.parts}, priors, noise, sign)

    def _run_program(self, args: tuple[Any, ...]) -> tuple[Tensor, dict[str, SitePrior], float]:
        """The whole program but for the weights that are known, and the backward pass."""
        values = {s.name: self.leaves[s.name] if s.transform is None else s.transform(self.leaves[s.name]) for s in self.guide.latents}
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
            priors[latent.name], counted, uncounted = self._prior(latent, run.latent[latent.name], values[latent.name])
            if counted is not None:
                loss, open_kl = loss + self.kl_weight * counted, open_kl + float(counted.detach())
            if uncounted is not None:
                loss, moving = loss + self.kl_weight * uncounted, True
        loss.backward()  # type: ignore[no-untyped-call]
        if self.network is not None and not self.declared and not moving:
            self.declared = {name: prior for name, prior in priors.items() if name in self.network.plain_weights}
        return likelihood, priors, open_kl

    def _prior(self, latent: Latent, msg: Any, value: Tensor) -> tuple[SitePrior, Tensor | None, Tensor | None]:
        """The prior of a site; its part of the KL if that has no closed form; and what the loss alone needs if the moments depend on other sites."""
        name, weight = latent.name, float(msg["scale"])
        base = base_distribution(msg["fn"])
        base = base.base_dist if hasattr(base, "alive") else base  # a program under `pruning.Masked`
        gaussian = gaussian_on_the_line(base, latent.transform)
        if gaussian is None:
            log_p = base.log_prob(value)
            if base.event_shape and self.living is not None and len(self.living[name]) < value.numel():
                raise ModelError(does_not_split(name, base))
            if latent.transform is not None:
                jacobian = latent.transform.log_abs_det_jacobian(self.leaves[name], value)
                log_p = log_p + (jacobian.flatten(-len(base.event_shape)).sum(-1) if base.event_shape else jacobian)
            log_p = log_p if base.event_shape else self._alive(name, log_p, value.shape)
            return SitePrior(0.0, 0.0, 0.0, weight), -weight * log_p.sum(), None
        mean, scale = (t if t.ndim == 0 else self._alive(name, t, value.shape) for t in (collapsed(gaussian.loc), collapsed(gaussian.scale)))
        part = self.parts[name]
        uncounted = None
        if mean.requires_grad or scale.requires_grad:
            ratio = ((self.loc.detach()[part] - mean).square() + self.std[part].square()) / scale.square()
            uncounted = weight * (scale.log().expand(ratio.shape) + 0.5 * ratio).sum()
        eta, s = mean.detach(), scale.detach()
        log_scales = float(s.log()) * (part.stop - part.start) if s.ndim == 0 else float(s.log().sum())
        prior = SitePrior(float(eta) if eta.ndim == 0 else eta, float(s) ** -2 if s.ndim == 0 else s.square().reciprocal(), log_scales, weight)
        return prior, None, uncounted

    def _alive(self, name: str, values: Tensor, shape: torch.Size) -> Tensor:
        flat = values.expand(shape).reshape(-1)
        return flat if self.living is None else flat[self.living[name]]

    def _closed_kl(self, name: str, prior: SitePrior, noise: Tensor) -> float:
        part = self.parts[name]
        size, log_scales = part.stop - part.start, float(self.log_scale[part].sum())
        if isinstance(prior.precision, float) and prior.precision == 0:  # log q alone
            return -prior.weight * (log_scales + 0.5 * float(noise[part].square().sum()) + 0.5 * size * math.log(2 * math.pi))
        loc, std = self.loc.detach()[part], self.std[part]
        deviation = loc if isinstance(prior.loc, float) and prior.loc == 0 else loc - prior.loc
        if isinstance(prior.precision, float):
            ratio = prior.precision * (float(torch.dot(deviation, deviation)) + float(torch.dot(std, std)))
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

    @torch.no_grad()
    def write_gradients(self, draw: Draw) -> None:
        """The gradient of the loss in `loc.grad` and `log_scale.grad`, for any optimiser. It takes the place of the draw: one call per run."""
        for chunk in self.chunks:
            prior, g, std = draw.priors[chunk.name], draw.gradients[chunk.name][chunk.here], chunk.std
            w, mean, precision = self.kl_weight * prior.weight, at(prior.loc, chunk.here), at(prior.precision, chunk.here)
            inner = torch.mul(std, w * precision, out=chunk.scratch)
            std.mul_(inner.addcmul_(g, draw.noise[chunk.part], value=draw.sign)).sub_(w)
            add_pull(g, chunk.loc, mean, precision, w, chunk.draw)
        self.stale = [True] * len(self.chunks)
        self.loc.grad, self.log_scale.grad = self.draw, self.std

    @torch.no_grad()
    def prune(self, masks: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
        """Keeps the entries that live by `masks` (site → bool tensor) alone, in the vectors and in the state of `optimizer`."""
        living: dict[str, Tensor] = {}
        survivors = []
        for latent in self.guide.latents:
            name, part = latent.name, self.parts[latent.name]
            before = torch.arange(latent.shape.numel(), device=self.loc.device) if self.living is None else self.living[name]
            stays = masks[name].reshape(-1)[before] if name in masks else torch.ones_like(before, dtype=torch.bool)
            living[name] = before[stays]
            survivors.append(part.start + stays.nonzero()[:, 0])
        kept = torch.cat(survivors)
        if len(kept) == self.loc.numel():
            return
        self.write_back()
        self.living = living
        self.loc, self.log_scale = (_replaced(flat, kept, optimizer) for flat in (self.loc, self.log_scale))
        self._lay_out()

    def state(self) -> dict[str, Any]:
        """What the steps so far have changed, for a checkpoint. The KL is up to eight steps old, and is evaluated anew when the declared priors change."""
        declared = {name: tuple(prior) for name, prior in self.declared.items()}
        return {"loc": self.loc, "log_scale": self.log_scale, "kl": self.kl, "declared": declared, "settled": self.priors is self.declared}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`, after `prune` with its masks."""
        self.loc.copy_(state["loc"])
        self.log_scale.copy_(state["log_scale"])
        self.stale = [True] * len(self.chunks)
        self.kl = state["kl"]
        device = self.loc.device
        self.declared = {n: SitePrior._make(v.to(device) if isinstance(v, Tensor) else v for v in prior) for n, prior in state["declared"].items()}
        self.priors = self.declared if state["settled"] else {}

    @torch.no_grad()
    def write_back(self) -> None:
        """The guide's vectors as the fit has them now; pruned entries stay as they were when they were pruned."""
        if self.living is not None:
            for flat, compact in ((self.guide.loc, self.loc), (self.guide.log_scale, self.log_scale)):
                for name, view in self.guide.views(flat.detach()).items():
                    view.view(-1).scatter_(0, self.living[name], compact[self.parts[name]])


def at(values: float | Tensor, here: slice) -> float | Tensor:
    """A number, or a part of one number per entry."""
    return values if isinstance(values, float) else values[here]


def add_pull(g: Tensor, loc: Tensor, mean: float | Tensor, precision: float | Tensor, weight: float, out: Tensor) -> Tensor:
    """g + weight · p (μ − η), the gradient of a mean with the pull of its prior."""
    if isinstance(precision, float) and isinstance(mean, float):
        torch.add(g, loc, alpha=weight * precision, out=out)
        return out.sub_(weight * precision * mean) if mean else out
    return torch.add(g, (loc - mean) * precision, alpha=weight, out=out)


def _replaced(flat: nn.Parameter, kept: Tensor, optimizer: Optimizer | None) -> nn.Parameter:
    """The kept entries of a parameter as a new one, which takes its place in an optimiser, state included."""
    compact = nn.Parameter(flat.detach()[kept])
    if optimizer is None:
        return compact
    for group in optimizer.param_groups:
        group["params"] = [compact if p is flat else p for p in group["params"]]
    state = optimizer.state.pop(flat, None)
    if state is not None:
        optimizer.state[compact] = {k: v[kept] if isinstance(v, Tensor) and v.shape == flat.shape else v for k, v in state.items()}
    return compact
