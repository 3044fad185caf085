"""The evidence lower bound of one batch, its two terms apart: expected log likelihood and KL
divergence.

Owns `elbo_terms`. The guides of this library have the KL of Gaussian sites in closed form; for
`MeanField` the value and gradient at a fixed draw are those of Pyro's `TraceMeanField_ELBO`. Every
other guide goes through Pyro's traces, with the value of `Trace_ELBO`. Next: `noise.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bmr.data.inputs import rows_in
from pyro_bmr.errors import ModelError
from pyro_bmr.guides import MeanField, SiteWise
from pyro_bmr.guides.latent_sites import Latent, base_distribution, gaussian_on_the_line
from pyro_bmr.guides.row_noise import PER_ROW, RowNoise
from pyro_bmr.guides.site_normal import Independent, SiteNormal, entropy, gaussian_kl, log_density
from pyro_bmr.guides.sites import check_guide, guide_shapes
from pyro_bmr.isolation import plain, world
from pyro_bmr.pruning import Masked
from pyro_bmr.tracing import Values, collapsed, does_not_split, likelihood_of


class ELBOTerms(NamedTuple):
    """ELBO = expected_log_likelihood − kl, both one-draw estimates in nats for the whole data
    set.
    """

    expected_log_likelihood: Tensor
    kl: Tensor


def elbo_terms(
    program: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    masks: Mapping[str, Tensor] | None = None,
    noise: Tensor | None = None,
) -> ELBOTerms:
    r"""One draw's estimate of both terms, differentiable in the parameters of `program` and
    `guide`.

    .. math:: \mathrm{ELBO} = \mathbb{E}_q[\log p(y \mid \theta)] - \mathrm{KL}(q(\theta) \,\|\,
        p(\theta))

    Args:
        masks: site → bool tensor of the kept entries, for `MeanField` and the guides with a
            Gaussian per site; others are wrapped in `pruning.Masked` by the caller.
        noise: the standard-normal draw of those guides, flat; by default a new one.
    """
    with world(program, *args, draws=True, grad=False):
        return terms_of(program, guide, tuple(map(plain, args)), masks or {}, noise)


def terms_of(
    program: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    masks: Mapping[str, Tensor],
    noise: Tensor | None = None,
) -> ELBOTerms:
    """`elbo_terms` within a call of the library."""
    if isinstance(guide, (MeanField, SiteWise)):
        return _site_wise_terms(program, guide, args, masks, noise)
    guide_trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args))
    shapes = guide_shapes(guide_trace)
    values: dict[str, Any] = {name: guide_trace.nodes[name]["value"] for name in shapes}
    with Values(values) as run:
        model_trace = prune_subsample_sites(poutine.trace(program).get_trace(*args))
    check_guide(shapes, run.latent_shapes())
    model_trace.compute_log_prob()
    guide_trace.compute_log_prob()
    likelihood = sum(
        site["log_prob_sum"]
        for site in model_trace.nodes.values()
        if site["type"] == "sample" and site["is_observed"]
    )
    prior = sum(site["log_prob_sum"] for _, site in model_trace.iter_stochastic_nodes())
    entropy = -sum(site["log_prob_sum"] for _, site in guide_trace.iter_stochastic_nodes())
    return ELBOTerms(torch.as_tensor(likelihood), torch.as_tensor(-prior - entropy))


def masked_terms(
    program: Callable[..., Any],
    guide: Callable[..., Any],
    batch: tuple[Any, ...],
    masks: Mapping[str, Tensor],
) -> ELBOTerms:
    """Both terms of the ELBO with `masks` in force, whichever the guide: the one way to them, for
    fits and for the bounds of fits.
    """
    if not masks or isinstance(guide, (MeanField, SiteWise)):
        return terms_of(program, guide, batch, masks)
    masked = Masked(masks)
    return terms_of(masked(program), masked(guide), batch, {})


class _Drawn(NamedTuple):
    """One draw of all sites, each by its name: its Gaussian, the draw on the unconstrained scale,
    the noise of that draw unless it is drawn for each row, and the value that the program gets.
    """

    gaussians: dict[str, SiteNormal]
    draws: dict[str, Tensor]
    noises: dict[str, Tensor]
    values: dict[str, Tensor]


def _site_wise_terms(
    program: Callable[..., Any],
    guide: SiteWise | MeanField,
    args: tuple[Any, ...],
    masks: Mapping[str, Tensor],
    noise: Tensor | None,
) -> ELBOTerms:
    """The terms of a guide with a Gaussian per site. The KL is in closed form where the prior is
    Gaussian on the line, else it is −H(q) − log p at the draw. With one noise vector for a whole
    `MeanField` it is log q − log p there, as in Pyro's `TraceMeanField_ELBO`.
    """
    one_vector = isinstance(guide, MeanField) and guide.estimator not in PER_ROW
    if noise is None and isinstance(guide, MeanField) and one_vector:
        noise = torch.randn_like(guide.loc)
    drawn = _drawn(guide, args, masks, noise)
    with Values(drawn.values) as run:
        program(*args)
    check_guide({site.name: site.shape for site in guide.latents}, run.latent_shapes())
    likelihood = likelihood_of(run)
    like = drawn.gaussians[guide.latents[0].name].mean
    kl = torch.zeros((), dtype=like.dtype, device=like.device)
    for site in guide.latents:
        q, z, msg = drawn.gaussians[site.name], drawn.draws[site.name], run.latent[site.name]
        own = drawn.noises.get(site.name) if one_vector else None
        kl = kl + _site_kl(site, q, z, base_distribution(msg["fn"]), own) * msg["scale"]
    return ELBOTerms(likelihood, kl)


def _drawn(
    guide: SiteWise | MeanField,
    args: tuple[Any, ...],
    masks: Mapping[str, Tensor],
    noise: Tensor | None,
) -> _Drawn:
    """A draw of each site in turn, given the sites before: from `noise`, or from new noise, which
    for the estimators in `PER_ROW` is drawn for each row of `args`.
    """
    conditional = guide.conditional if isinstance(guide, SiteWise) else guide.conditionals()
    drawn = _Drawn({}, {}, {}, {})
    used = 0
    for site in guide.latents:
        mask = masks.get(site.name, site.mask)
        mask = mask if mask is None or site.mask is None else mask & site.mask
        q = conditional(site.name, drawn.values, mask)
        per_row = guide.estimator in PER_ROW and site.transform is None and noise is None
        if per_row and isinstance(q, Independent):
            z: Tensor = RowNoise(q.mean, q.std, rows_in(args[0]), guide.estimator)
        else:
            own = (
                torch.randn(q.noise_size, dtype=q.mean.dtype, device=q.mean.device)
                if noise is None
                else noise[used : used + q.noise_size]
            )
            used += q.noise_size
            z, drawn.noises[site.name] = q.draw(own), own
        drawn.gaussians[site.name], drawn.draws[site.name] = q, z
        drawn.values[site.name] = z if site.transform is None else site.transform(z)
    return drawn


def _site_kl(site: Latent, q: SiteNormal, z: Tensor, base: Any, noise: Tensor | None) -> Tensor:
    """The KL divergence of a site whose prior is `base`, at the draw z."""
    if hasattr(base, "kept"):  # a program under `pruning.Masked`
        if isinstance(q, Independent):
            mask = base.kept if q.mask is None else base.kept & q.mask
            q = Independent.of(q.mean, q.log_std, mask)
        base = base.base_dist
    prior = gaussian_on_the_line(base, site.transform)
    if prior is None:
        return _sampled_kl(site, q, z, base, noise)
    if isinstance(q, Independent):
        moments = collapsed(prior.loc), collapsed(prior.scale)
        kl: Tensor = _GaussianKL.apply(q.mean, q.log_std, q.std.detach(), *moments, q.mask)
        return kl
    return gaussian_kl(q, prior.loc, prior.scale)


def _sampled_kl(site: Latent, q: SiteNormal, z: Tensor, prior: Any, noise: Tensor | None) -> Tensor:
    """−H(q) − log p(z), the prior's density counted on the unconstrained scale; with the `noise` of
    z, log q(z) in the place of −H(q).
    """
    z = z.draw() if isinstance(z, RowNoise) else z
    value = z if site.transform is None else site.transform(z)
    log_p = prior.log_prob(value)
    if prior.event_shape and q.mask is not None:
        raise ModelError(does_not_split(site.name, prior))
    if site.transform is not None:
        log_jacobian = site.transform.log_abs_det_jacobian(z, value)
        log_p = log_p + (
            log_jacobian.flatten(-len(prior.event_shape)).sum(-1)
            if prior.event_shape
            else log_jacobian
        )
    return (-entropy(q) if noise is None else log_density(q, z, noise)) - (
        log_p if q.mask is None else log_p.where(q.mask, 0)
    ).sum()


class _GaussianKL(torch.autograd.Function):
    """KL(N(μ, σ²) ‖ N(m, s²)) = Σ log(s/σ) + ((μ − m)² + σ²)/(2s²) − ½ over the kept entries,
    with its gradient by hand.

    A prior of one scale for the whole site needs three sums and no temporary of the site's size.
    """

    @staticmethod
    def forward(ctx, loc, log_scale, std, prior_loc, prior_scale, mask):  # type: ignore[no-untyped-def]
        # elsewhere the host would wait for the device to know that a mean is 0
        known = prior_loc.ndim == 0 and prior_loc.device.type == "cpu"
        deviation = (
            loc if known and not prior_loc.requires_grad and prior_loc == 0 else loc - prior_loc
        )
        count = loc.numel()
        if mask is not None:
            deviation, std, log_scale, count = (
                deviation * mask,
                std * mask,
                log_scale * mask,
                mask.sum(),
            )
        if prior_scale.ndim == 0:
            ratio = (
                torch.dot(deviation.flatten(), deviation.flatten())
                + torch.dot(std.flatten(), std.flatten())
            ) / prior_scale.square()
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
            grad_prior_scale = (
                grad * (ctx.count - ratio) / prior_scale
                if prior_scale.ndim == 0
                else ((alive - grad * ratio) / prior_scale)
            )
            grad_prior_scale = grad_prior_scale.sum_to_size(prior_scale.shape)
        return grad_loc, grad_log_scale, None, grad_prior_loc, grad_prior_scale, None
