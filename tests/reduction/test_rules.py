"""What one reduced prior says of one site: priors of the user's own, groups, slabs, shared
inclusion, scales per unit.
"""

import itertools
import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

import pyro_bmr as bmr
from pyro_bmr.formulas.quadrature import density_reduction
from pyro_bmr.formulas.scale_mixture import best_scale, scale_mixture_reduction
from pyro_bmr.formulas.spike_and_slab import exact_inclusion
from pyro_bmr.posteriors.site import Site
from pyro_bmr.reduction.reduced_site import site_reduction
from pyro_bmr.reduction.slabs import shared_inclusion

RNG = np.random.default_rng(7)
MEAN = torch.tensor(
    np.where(RNG.random((4, 6)) < 0.4, RNG.normal(0, 1, (4, 6)), RNG.normal(0, 0.05, (4, 6)))
)
VAR = torch.tensor(RNG.uniform(0.005, 0.06, (4, 6)))
PRIOR = bmr.formulas.Diagonal(
    torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
)
SPIKE = stats.norm(MEAN, VAR**0.5).logpdf(0) - stats.norm(0, 1.7**0.5).logpdf(0)
ROWS = torch.arange(4)[:, None].expand(4, 6)


def posterior(mask=None):
    return bmr.Posterior({"w": Site(MEAN, VAR, PRIOR, mask=mask)})


@dataclass(frozen=True)
class OwnGaussian:
    """A user's prior: a Gaussian with a width for each row."""

    shrinkage: ClassVar[bool] = False
    mean: float = 0.0

    @property
    def var(self):
        return torch.tensor([0.1, 0.4, 0.9, 1.6], dtype=torch.float64)[:, None]


@dataclass(frozen=True)
class OwnDensity:
    """A user's prior: nothing but a density, a Laplace."""

    scale: float
    shrinkage: ClassVar[bool] = True

    def log_prob(self, w):
        return -w.abs() / self.scale - math.log(2 * self.scale)


@dataclass(frozen=True)
class OwnMixture:
    """A user's prior: two Gaussians."""

    shrinkage: ClassVar[bool] = True

    def mixture(self, scale=None):
        return np.array([0.04, 1.3]), np.log([0.7, 0.3])

    def log_prob(self, w):
        return torch.log(
            0.7 * torch.exp(torch.distributions.Normal(0.0, 0.2).log_prob(w))
            + 0.3 * torch.exp(torch.distributions.Normal(0.0, 1.3**0.5).log_prob(w))
        )


def test_a_class_with_moments_is_a_gaussian():
    mask = torch.rand(4, 6) < 0.7
    got = site_reduction(posterior(mask), "w", OwnGaussian())
    target = bmr.formulas.Diagonal(torch.zeros(4, 6).double(), OwnGaussian().var.expand(4, 6))
    gain, reduced = (
        bmr.delta_f(bmr.formulas.Diagonal(MEAN, VAR), PRIOR, target),
        bmr.formulas.reduced_posterior(bmr.formulas.Diagonal(MEAN, VAR), PRIOR, target),
    )
    assert got.delta_f == pytest.approx(gain[mask].sum().item(), abs=1e-9)
    torch.testing.assert_close(got.site.mean[mask], reduced.mean[mask])
    torch.testing.assert_close(got.site.prior.var[mask], target.var[mask])
    assert (
        (got.drop_log_odds[mask] == -math.inf).all()
        and (got.drop_log_odds[~mask] == math.inf).all()
        and got.spike_delta_f[~mask].isnan().all()
    )


def test_a_class_with_a_density_is_its_mixture():
    """The same prior said in two ways: quadrature over the weight is the sum over the two
    Gaussians.
    """
    by_mixture = site_reduction(posterior(), "w", OwnMixture())
    q = bmr.formulas.Diagonal(MEAN, VAR)
    by_density = density_reduction(q, PRIOR, OwnMixture().log_prob)
    assert by_mixture.delta_f == pytest.approx(by_density.delta_f.sum().item(), abs=1e-6)
    torch.testing.assert_close(by_mixture.site.mean, by_density.mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(by_mixture.site.var, by_density.var, rtol=0, atol=1e-7)

    class OnlyDensity:
        shrinkage = True
        log_prob = OwnMixture().log_prob

    drop = site_reduction(posterior(), "w", OnlyDensity()).drop_log_odds
    torch.testing.assert_close(
        torch.sigmoid(drop), torch.sigmoid(by_mixture.drop_log_odds), rtol=0, atol=1e-5
    )


def test_a_density_with_a_kink_by_scipy():
    got = density_reduction(bmr.formulas.Diagonal(MEAN[0], VAR[0]), PRIOR, OwnDensity(0.3).log_prob)
    for i in range(2):
        m, s = MEAN[0, i].item(), VAR[0, i].item() ** 0.5
        f = lambda w, m=m, s=s: (  # noqa: E731
            math.exp(-0.5 * ((w - m) / s) ** 2 + 0.5 * w * w / 1.7 - abs(w) / 0.3)
            / 0.6
            * 1.7**0.5
            / s
        )
        evidence = sum(
            integrate.quad(f, *ends, epsabs=1e-13)[0]
            for ends in ((-10, min(0, m)), (min(0, m), max(0, m)), (max(0, m), 10))
        )
        assert got.delta_f[i].item() == pytest.approx(math.log(evidence), abs=1e-7)


def test_what_is_no_target():
    with pytest.raises(
        bmr.errors.ReductionError,
        match="expected a prior with mean and var, with mixture, or with log_prob, got an object",
    ):
        site_reduction(posterior(), "w", object())
    with pytest.raises(bmr.errors.ReductionError, match=r"site 'w'.*one number for each weight"):
        bmr.reduce(posterior(), to=type("Bad", (), {"log_prob": lambda self, w: w.sum()})())
    with pytest.raises(
        bmr.errors.ReductionError,
        match=r"integer tensor of the site's shape \(4, 6\), got torch.float64",
    ):
        site_reduction(posterior(), "w", bmr.SpikeAndSlab(), groups=MEAN)
    with pytest.raises(bmr.errors.ReductionError, match="shape \\(6,\\)"):
        site_reduction(posterior(), "w", bmr.SpikeAndSlab(), groups=torch.arange(6))


def test_groups_share_an_indicator():
    """A spike and slab on rows: enumeration over the 2⁴ subsets of rows."""
    got = site_reduction(posterior(), "w", bmr.SpikeAndSlab(alpha=1.5, beta=2.5), groups=ROWS + 7)
    sums = SPIKE.sum(1)
    terms, inside = [], []
    for subset in itertools.product([0, 1], repeat=4):
        k = sum(subset)
        terms.append(
            special.betaln(1.5 + k, 2.5 + 4 - k)
            - special.betaln(1.5, 2.5)
            + sum(d for d, s in zip(sums, subset, strict=True) if not s)
        )
        inside.append(subset)
    gain = special.logsumexp(terms)
    assert got.delta_f == pytest.approx(gain, abs=1e-8)
    expected = np.exp(np.array(terms) - gain) @ np.array(inside)
    np.testing.assert_allclose(got.inclusion, np.broadcast_to(expected[:, None], (4, 6)), atol=1e-8)


def test_a_slab_of_its_own():
    """The gain is that of the slab for all, plus that of the spikes over it; the survivors have the
    moments of the slab.
    """
    got = site_reduction(posterior(), "w", bmr.SpikeAndSlab(slab_scale=0.8))
    slab = bmr.delta_f(bmr.formulas.Diagonal(MEAN, VAR), PRIOR, bmr.Gaussian(0.8))
    exact = exact_inclusion(torch.tensor(SPIKE) - slab)
    assert got.delta_f == pytest.approx(
        slab.sum().item() + exact.log_evidence_gain.item(), abs=1e-9
    )
    torch.testing.assert_close(
        got.site.mean,
        bmr.formulas.reduced_posterior(
            bmr.formulas.Diagonal(MEAN, VAR), PRIOR, bmr.Gaussian(0.8)
        ).mean,
    )
    assert got.site.prior.var.item() == pytest.approx(0.64)
    torch.testing.assert_close(got.inclusion, exact.probability)


def redundant():
    """A layer whose empirical scale is too narrow for a slab: most weights have hardly left their
    prior, and the prior fits all together.
    """
    generator = torch.Generator().manual_seed(1)
    needed = torch.rand(3000, generator=generator) < 0.1
    mean = torch.where(needed, 2.2, 0.25).double() * torch.randn(
        3000, generator=generator, dtype=torch.float64
    )
    var = torch.where(needed, 0.02, 0.75).double()
    return (
        bmr.Posterior(
            {
                "w": Site(
                    mean,
                    var,
                    bmr.formulas.Diagonal(
                        torch.zeros((), dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
                    ),
                )
            }
        ),
        needed,
    )


def test_an_empirical_slab_has_the_best_evidence_and_tells_the_needed_from_the_rest():
    q, needed = redundant()
    narrow, found = (
        site_reduction(q, "w", bmr.SpikeAndSlab()),
        site_reduction(q, "w", bmr.SpikeAndSlab(slab_scale="empirical")),
    )
    width = found.site.prior.var.sqrt().item()
    gains = [
        site_reduction(q, "w", bmr.SpikeAndSlab(slab_scale=width * f)).delta_f
        for f in (0.8, 1.0, 1.25)
    ]
    assert gains[1] > max(gains[0], gains[2]) and gains[1] == pytest.approx(found.delta_f, abs=1e-6)
    assert found.delta_f > narrow.delta_f + 10
    kept = (narrow.drop_log_odds <= 0).double().mean(), (found.drop_log_odds <= 0).double().mean()
    assert kept[0] > 0.5 > 0.15 > kept[1] > 0.03  # by its evidence the narrow slab keeps most
    assert (needed & (found.drop_log_odds <= 0)).sum() > 0.9 * (found.drop_log_odds <= 0).sum()


@pytest.mark.slow
def test_a_slab_that_noise_would_widen_is_bounded_and_told():
    """A layer as of a short fit: of most weights the data say next to nothing, and their m = h/L is
    noise over nearly nothing, hundreds of prior scales out.
    """
    generator = torch.Generator().manual_seed(5)
    precision = torch.where(
        torch.rand(4000, generator=generator) < 0.05, 20.0, 0.03
    ).double() * torch.rand(4000, generator=generator, dtype=torch.float64)
    var = 1 / (1 + precision)
    mean = torch.where(precision > 0.03, 1.5, 0.25) * torch.randn(
        4000, generator=generator, dtype=torch.float64
    )
    q = bmr.Posterior(
        {
            "w": Site(
                mean,
                var,
                bmr.formulas.Diagonal(
                    torch.zeros((), dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
                ),
            )
        }
    )
    widest = 2 * (mean.square() + var).max().sqrt().item()
    further = [
        site_reduction(q, "w", bmr.SpikeAndSlab(slab_scale=widest * f)).delta_f for f in (1, 10, 50)
    ]
    assert further[0] < further[1] < further[2]  # the evidence would go on
    with pytest.warns(
        UserWarning, match=r"site 'w': .* an end of the search, .* give slab_scale a number"
    ):
        found = site_reduction(q, "w", bmr.SpikeAndSlab(slab_scale="empirical"))
    assert found.site.prior.var.sqrt().item() == pytest.approx(widest, rel=0.02)


def test_the_bound_is_no_hindrance_where_the_data_speak():
    """One weight, whose best width is √(m² − 1/L), beyond itself: the prior took nearly half of
    it.
    """
    q = bmr.Posterior(
        {
            "w": Site(
                *torch.tensor([[[1.2]], [[0.045]]], dtype=torch.float64),
                bmr.formulas.Diagonal(*torch.tensor([0.0, 0.1], dtype=torch.float64)),
            )
        }
    )
    precision = 1 / 0.045 - 10
    best = ((1.2 / 0.045 / precision) ** 2 - 1 / precision) ** 0.5
    found = site_reduction(q, "w", bmr.SpikeAndSlab(slab_scale="empirical", inclusion=0.999999))
    assert best > 2.1 and found.site.prior.var.sqrt().item() == pytest.approx(best, rel=0.01)


def test_one_inclusion_for_all_sites():
    q = bmr.Posterior(
        {
            "a": Site(MEAN, VAR, PRIOR),
            "b": Site(2 * MEAN[0], VAR[0], PRIOR),
            "noise": Site(MEAN[0], VAR[0], support="positive"),
        }
    )
    targets = shared_inclusion(q, bmr.SpikeAndSlab(alpha=1.5, beta=2.5))
    pooled = np.concatenate(
        [
            SPIKE.flatten(),
            stats.norm(2 * MEAN[0], VAR[0] ** 0.5).logpdf(0) - stats.norm(0, 1.7**0.5).logpdf(0),
        ]
    )
    zeta = 0.0
    for _ in range(500):
        rho = special.expit(zeta - pooled).sum()
        zeta = special.digamma(1.5 + rho) - special.digamma(2.5 + 30 - rho)
    assert list(targets) == ["a", "b"] and targets["a"].inclusion == targets[
        "b"
    ].inclusion == pytest.approx(special.expit(zeta), abs=1e-6)
    result = bmr.reduce(q, to=targets)
    assert np.array_equal(result.masks["a"], zeta >= SPIKE)
    pi = targets["a"].inclusion
    assert result.sites["a"].delta_f == pytest.approx(
        np.logaddexp(np.log(pi), np.log(1 - pi) + SPIKE).sum(), abs=1e-8
    )
    with pytest.raises(bmr.errors.ReductionError, match="site 'noise'"):
        shared_inclusion(q, bmr.SpikeAndSlab(), ["noise"])


def test_an_empirical_scale_for_each_group():
    small = torch.stack([MEAN[1], -0.8 * MEAN[1].flip(0), 0.01 * MEAN[2], 0.01 * MEAN[3]])
    q = bmr.Posterior({"w": Site(small, VAR, PRIOR)})
    got = site_reduction(q, "w", bmr.Gaussian(), groups=ROWS)
    assert got.scales.shape == (4,) and (got.scales[:2] > 0).all() and (got.scales[2:] == 0).all()
    assert (
        torch.equal(
            got.drop_log_odds > 0, torch.tensor([False, False, True, True])[:, None].expand(4, 6)
        )
        and got.delta_f > site_reduction(q, "w", bmr.Gaussian()).delta_f
    )
    by_row = [
        site_reduction(
            bmr.Posterior({"w": Site(small[k], VAR[k], PRIOR)}), "w", bmr.Gaussian()
        ).delta_f
        for k in range(2)
    ]
    zero = sum(
        (stats.norm(small[k], VAR[k] ** 0.5).logpdf(0) - stats.norm(0, 1.7**0.5).logpdf(0)).sum()
        for k in (2, 3)
    )
    assert got.delta_f == pytest.approx(sum(by_row) + zero, abs=1e-4)


@pytest.mark.slow
def test_a_horseshoe_on_units_drops_whole_units():
    small = torch.stack([MEAN[1], -0.8 * MEAN[1].flip(0), 0.01 * MEAN[2], 0.01 * MEAN[3]])
    q = bmr.Posterior({"w": Site(small, VAR, PRIOR)})
    by_prior, by_groups = (
        site_reduction(q, "w", bmr.Horseshoe(tiers=("layer", "unit"))),
        site_reduction(q, "w", bmr.Horseshoe(), groups=ROWS),
    )
    assert by_prior.delta_f == by_groups.delta_f and torch.equal(
        by_prior.drop_log_odds, by_groups.drop_log_odds
    )
    assert torch.equal(
        by_prior.drop_log_odds > 0, torch.tensor([False, False, True, True])[:, None].expand(4, 6)
    )


@pytest.mark.parametrize("large", [3, 40])
@pytest.mark.parametrize("tiers", [("layer", "weight"), ("weight",)])
def test_a_horseshoe_leaves_weights_of_noise_out(large, tiers):
    """Of 80 weights few or half are ten errors from zero, the others estimates of zero, the largest
    of them 2.7 errors away. If the scale is wide beside the errors, κ > ½ keeps all of them.
    """
    zero = torch.linspace(0.002, 0.998, 80 - large, dtype=torch.float64)
    noise = 2**0.5 * torch.erfinv(2 * zero - 1) * 2.7 / 2.88
    signal = torch.linspace(10, 60, large, dtype=torch.float64) * (-1) ** torch.arange(large)
    error = torch.linspace(0.02, 0.03, 80, dtype=torch.float64)
    mean, ones = torch.cat([signal, noise]) * error, torch.ones(80, dtype=torch.float64)
    precision = error**-2 + 1.0  # under N(0, 1)
    q = bmr.Posterior.from_moments(
        {"w": mean * error**-2 / precision}, {"w": 1 / precision}, bmr.Gaussian(1.0)
    )
    found = bmr.reduce(q, to=bmr.Horseshoe(tiers=tiers))
    assert found.masks["w"].nonzero()[:, 0].tolist() == list(range(large))
    scale = found.sites["w"].scale
    nodes = bmr.Horseshoe(tiers=tiers).mixture(scale)
    data = bmr.formulas.Message(mean * error**-2, error**-2)
    kappa = scale_mixture_reduction(data, ones, *nodes).kappa
    assert (int((kappa <= 0.5).sum()) > large) == (large == 40 or tiers == ("weight",))


def test_a_tau_for_each_unit():
    prior = bmr.Horseshoe(tiers=("unit", "weight"))
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1] = False  # a dead row has no tau
    got = site_reduction(posterior(mask), "w", prior)
    data = bmr.formulas.Message(MEAN[2] / VAR[2], 1 / VAR[2] - 1 / 1.7)
    tau = best_scale(data, torch.full((6,), 1.7).double(), prior.mixture, prior.log_hyper)
    assert got.scales.shape == (3,) and got.scales[1].item() == pytest.approx(tau.item(), rel=2e-3)
    direct = scale_mixture_reduction(
        data, torch.full((6,), 1.7).double(), *prior.mixture(got.scales[1].item())
    )
    torch.testing.assert_close(got.site.mean[2], direct.mean)


TARGETS = [
    bmr.Gaussian(0),
    bmr.Gaussian(0.3),
    bmr.Gaussian(),
    bmr.SpikeAndSlab(),
    bmr.SpikeAndSlab(slab_scale="empirical"),
    bmr.SpikeAndSlab(inclusion=0.2),
]
TARGETS += [
    bmr.Horseshoe(),
    bmr.Horseshoe(tiers=("layer", "unit")),
    bmr.Horseshoe(tiers=("unit", "weight")),
    OwnDensity(0.3),
    OwnMixture(),
    None,
]


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(TARGETS),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([(), (3,), (2, 3), (0,), (2, 2, 2)]),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
)
def test_every_target_answers_for_every_site(to, dtype, shape, seed, masked, grouped):
    """Shapes, dtypes, masks, groups, moments over many orders of magnitude: moments stay finite for
    what lives, ΔF is a number, no decision is NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator).mul(3).exp().to(dtype)
    var = (torch.randn(shape, generator=generator) * 4 - 3).exp().to(dtype)
    mask = torch.rand(shape, generator=generator) < 0.6 if masked else None
    if mask is not None:
        mean, var = mean.where(mask, 0), var.where(mask, 0)
    q = bmr.Posterior(
        {"w": Site(mean, var, bmr.formulas.Diagonal(torch.zeros(()), torch.tensor(1.3)), mask=mask)}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empirical slab may stand at an end of its search
        got = site_reduction(q, "w", to, torch.zeros(shape, dtype=torch.long) if grouped else None)
    alive = got.site.kept
    assert (
        got.drop_log_odds.shape == shape
        and got.drop_log_odds.dtype == dtype
        and not got.drop_log_odds.isnan().any()
        and (got.drop_log_odds[~alive] == math.inf).all()
    )
    assert (
        math.isfinite(got.delta_f) and got.site.mean.isfinite().all() and (got.site.var >= 0).all()
    )
    assert not got.spike_delta_f[alive].isnan().any() and got.site.mean.dtype == dtype
