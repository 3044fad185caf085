"""The evidence lower bound of one batch, its two terms apart: expected log likelihood and KL divergence.

Owns `elbo_terms`. For `MeanField` it takes the fast path: one noise vector for all sites, views instead of copies, the KL of Gaussian sites in closed
form. At a fixed draw it gives the value and gradient of Pyro's `TraceMeanField_ELBO`. Every other guide goes through
Pyro's traces, with the value of `Trace_ELBO`.
Next: `mean_field_step.py`, the same for a fit, without autograd where it can be had without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bmr.errors import ModelError
from pyro_bmr.guides import MeanField, SiteWise
from pyro_bmr.guides.mean_field import Latent, base_distribution, gaussian_on_the_line
from pyro_bmr.guides.row_noise import RowNoise
from pyro_bmr.guides.site_normal import Independent, SiteNormal, entropy, gaussian_kl


class ELBOTerms(NamedTuple):
    """ELBO = expected_log_likelihood − kl, both one-draw estimates in nats for the whole data set."""

    expected_log_likelihood: Tensor
    kl: Tensor


def elbo_terms(
    program: Callable[..., Any], guide: Callable[..., Any], *args: Any, masks: Mapping[str, Tensor] | None = None, noise: Tensor | None = None
) -> ELBOTerms:
    r"""One draw's estimate of both terms, differentiable in the parameters of `program` and `guide`.

    .. math:: \mathrm{ELBO} = \mathbb{E}_q[\log p(y \mid \theta)] - \mathrm{KL}(q(\theta) \,\|\, p(\theta))

    Args:
        masks: site → bool tensor of the entries that live, for `MeanField` and the guides with a Gaussian per site; others are wrapped in
            `pruning.Masked` by the caller.
        noise: the standard-normal draw of those guides, flat; by default a new one.
    """
    if isinstance(guide, SiteWise) or (isinstance(guide, MeanField) and guide.estimator != "weight"):
        return _site_wise_terms(program, guide, args, masks or {}, noise)
    if isinstance(guide, MeanField):
        return _mean_field_terms(program, guide, args, masks or {}, noise)
    guide_trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args))
    model_trace = prune_subsample_sites(poutine.trace(poutine.replay(program, guide_trace)).get_trace(*args))
    model_trace.compute_log_prob()
    guide_trace.compute_log_prob()
    likelihood = sum(site["log_prob_sum"] for site in model_trace.nodes.values() if site["type"] == "sample" and site["is_observed"])
    prior = sum(site["log_prob_sum"] for _, site in model_trace.iter_stochastic_nodes())
    entropy = -sum(site["log_prob_sum"] for _, site in guide_trace.iter_stochastic_nodes())
    return ELBOTerms(torch.as_tensor(likelihood), torch.as_tensor(-prior - entropy))


def _site_wise_terms(
    program: Callable[..., Any], guide: SiteWise | MeanField, args: tuple[Any, ...], masks: Mapping[str, Tensor], noise: Tensor | None
) -> ELBOTerms:
    """Guides with a Gaussian per site: noise where the guide's estimator wants it, the KL in closed form where the prior is Gaussian on the line, else −H(q) −
    log p at the draw."""
    gaussians: dict[str, SiteNormal] = {}
    draws: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    used = 0
    for site in guide.latents:
        mask = masks.get(site.name, site.alive)
        mask = mask if mask is None or site.alive is None else mask & site.alive
        q = guide.conditional(site.name, values, mask)
        if guide.estimator != "weight" and isinstance(q, Independent) and site.transform is None and noise is None:
            z: Tensor = RowNoise(q.mean, q.std, len(args[0]), guide.estimator)
        else:
            z = q.draw(torch.randn(q.noise_size, dtype=q.mean.dtype, device=q.mean.device) if noise is None else noise[used : used + q.noise_size])
            used += q.noise_size
        gaussians[site.name], draws[site.name] = q, z
        values[site.name] = z if site.transform is None else site.transform(z)
    with Values(values) as run:
        program(*args)
    likelihood = likelihood_of(run)
    like = gaussians[guide.latents[0].name].mean
    kl = torch.zeros((), dtype=like.dtype, device=like.device)
    for site in guide.latents:
        q, msg = gaussians[site.name], run.latent[site.name]
        base = base_distribution(msg["fn"])
        base = base.base_dist if hasattr(base, "alive") else base
        prior = gaussian_on_the_line(base, site.transform)
        if prior is None:
            kl_site = _sampled_kl(site, q, draws[site.name], base)
        elif isinstance(q, Independent):
            kl_site = _GaussianKL.apply(q.mean, q.log_std, q.std.detach(), collapsed(prior.loc), collapsed(prior.scale), q.mask)
        else:
            kl_site = gaussian_kl(q, prior.loc, prior.scale)
        kl = kl + kl_site * msg["scale"]
    return ELBOTerms(likelihood, kl)


def _sampled_kl(site: Latent, q: SiteNormal, z: Tensor, prior: Any) -> Tensor:
    """−H(q) − log p(z), the prior's density counted on the unconstrained scale."""
    z = z.draw() if isinstance(z, RowNoise) else z
    value = z if site.transform is None else site.transform(z)
    log_p = prior.log_prob(value)
    if prior.event_shape and q.mask is not None:
        raise ModelError(does_not_split(site.name, prior))
    if site.transform is not None:
        log_jacobian = site.transform.log_abs_det_jacobian(z, value)
        log_p = log_p + (log_jacobian.flatten(-len(prior.event_shape)).sum(-1) if prior.event_shape else log_jacobian)
    return -entropy(q) - (log_p if q.mask is None else log_p.where(q.mask, 0)).sum()


class Values(Messenger):
    """Sets latent sites to given values and records the message of every latent and observed site. Enter it outside all other handlers."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.latent: dict[str, Any] = {}
        self.observed: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) or msg["infer"].get("_deterministic"):
            return
        if msg["is_observed"]:
            self.observed[msg["name"]] = msg
        elif msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True
            self.latent[msg["name"]] = msg
        else:
            self.observed[msg["name"]] = msg  # an observation without data: a prediction


def _mean_field_terms(program: Callable[..., Any], guide: MeanField, args: tuple[Any, ...], masks: Mapping[str, Tensor], noise: Tensor | None) -> ELBOTerms:
    noise = torch.randn_like(guide.loc) if noise is None else noise
    flat_mask = (
        torch.cat(
            [
                masks[site.name].flatten() if site.name in masks else torch.ones(size, dtype=torch.bool, device=guide.loc.device)
                for site, size in zip(guide.latents, guide.sizes, strict=True)
            ]
        )
        if masks
        else None
    )
    z, std = _Draw.apply(guide.loc, guide.log_scale, noise, flat_mask)
    draws, stds, locs, log_scales, noises = (guide.views(flat) for flat in (z, std, guide.loc, guide.log_scale, noise))
    values = {site.name: draws[site.name] if site.transform is None else site.transform(draws[site.name]) for site in guide.latents}
    with Values(values) as run:
        program(*args)
    likelihood = likelihood_of(run)
    kl = torch.zeros((), dtype=z.dtype, device=z.device)
    for site in guide.latents:
        name, msg = site.name, run.latent[site.name]
        mask = masks.get(name)
        base = base_distribution(msg["fn"])
        if hasattr(base, "alive"):  # a program under `pruning.Masked`
            mask, base = (base.alive if mask is None else mask & base.alive), base.base_dist
        gaussian = gaussian_on_the_line(base, site.transform)
        if gaussian is not None:
            kl_site = _GaussianKL.apply(locs[name], log_scales[name], stds[name], collapsed(gaussian.loc), collapsed(gaussian.scale), mask)
        else:
            log_q = -log_scales[name] - 0.5 * noises[name].square() - 0.9189385332046727  # ½ log 2π
            if site.transform is not None:
                log_q = log_q - site.transform.log_abs_det_jacobian(draws[name], values[name])
            log_p = base.log_prob(values[name])
            if base.event_shape:
                if mask is not None:
                    raise ModelError(does_not_split(name, base))
                log_q = log_q.flatten(-len(base.event_shape)).sum(-1)
            difference = log_q - log_p
            kl_site = (difference if mask is None else difference.where(mask, 0)).sum()
        kl = kl + kl_site * msg["scale"]
    return ELBOTerms(likelihood, kl)


def likelihood_of(run: Values) -> Tensor:
    """The log density of the observed sites of a run."""
    likelihood: Tensor | float = 0.0
    for name, msg in run.observed.items():
        if not msg["is_observed"]:
            raise ModelError(f"site '{name}' of the program is not in the guide; make the guide from this program and batch")
        likelihood = likelihood + scale_and_mask(msg["fn"].log_prob(msg["value"]), msg["scale"], msg["mask"]).sum()
    return torch.as_tensor(likelihood)


def does_not_split(name: str, base: Any) -> str:
    """What is wrong with a mask on a site whose density is joint."""
    return f"site '{name}': the density of a {type(base).__name__} does not split over its entries, so they cannot be pruned"


def collapsed(parameter: Tensor) -> Tensor:
    """A number that was expanded to a site's shape, as the number again."""
    return parameter[(0,) * parameter.ndim] if parameter.ndim and not any(parameter.stride()) else parameter


class _Draw(torch.autograd.Function):
    """z = μ + σε (0 where masked) and σ; the gradient of log σ is that of z times σε."""

    @staticmethod
    def forward(ctx, loc, log_scale, noise, mask):  # type: ignore[no-untyped-def]
        std = log_scale.exp()
        step = std * noise
        z = loc + step
        if mask is not None:
            z.masked_fill_(~mask, 0)
        ctx.save_for_backward(step, mask)
        ctx.mark_non_differentiable(std)
        return z, std

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        step, mask = ctx.saved_tensors
        if mask is not None:
            grad = grad.masked_fill(~mask, 0)
        return grad, grad * step, None, None


class _GaussianKL(torch.autograd.Function):
    """KL(N(μ, σ²) ‖ N(m, s²)) = Σ log(s/σ) + ((μ − m)² + σ²)/(2s²) − ½ over the entries that live, with its gradient by hand.

    A prior of one scale for the whole site needs three sums and no temporary of the site's size.
    """

    @staticmethod
    def forward(ctx, loc, log_scale, std, prior_loc, prior_scale, mask):  # type: ignore[no-untyped-def]
        deviation = loc if prior_loc.ndim == 0 and not prior_loc.requires_grad and prior_loc == 0 else loc - prior_loc
        count = loc.numel()
        if mask is not None:
            deviation, std, log_scale, count = deviation * mask, std * mask, log_scale * mask, mask.sum()
        if prior_scale.ndim == 0:
            ratio = (torch.dot(deviation.flatten(), deviation.flatten()) + torch.dot(std.flatten(), std.flatten())) / prior_scale.square()
            kl = count * (prior_scale.log() - 0.5) - log_scale.sum() + 0.5 * ratio
        else:
            alive = 1.0 if mask is None else mask
            ratio = (deviation.square() + std.square()) / prior_scale.square()
            kl = (alive * prior_scale.log() - log_scale + 0.5 * ratio).sum() - 0.5 * count
        ctx.save_for_backward(deviation, ratio, std, prior_loc, prior_scale, mask)
        ctx.count = count
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        deviation, ratio, std, prior_loc, prior_scale, mask = ctx.saved_tensors
        per_var = grad / prior_scale.square()
        alive = grad if mask is None else grad * mask
        grad_loc = deviation * per_var
        grad_log_scale = std.square().mul_(per_var).sub_(alive)
        grad_prior_loc = grad_prior_scale = None
        if ctx.needs_input_grad[3]:
            grad_prior_loc = (-grad_loc).sum_to_size(prior_loc.shape)
        if ctx.needs_input_grad[4]:
            grad_prior_scale = grad * (ctx.count - ratio) / prior_scale if prior_scale.ndim == 0 else ((alive - grad * ratio) / prior_scale)
            grad_prior_scale = grad_prior_scale.sum_to_size(prior_scale.shape)
        return grad_loc, grad_log_scale, None, grad_prior_loc, grad_prior_scale, None
