"""Scale mixtures: the one-weight horseshoe against Simpson's rule over the local scale, others
against quadrature over the weight, groups, extremes.
"""

import math
import warnings

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, special, stats

import pyro_bmr as bmr
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.message import Message, message
from pyro_bmr.formulas.scale_mixture import best_scale, grouped_reduction, scale_mixture_reduction
from tests.parameters import others_slow
from tests.reference import mixtures

PRIOR_VAR = 1.5
HORSESHOE = bmr.Horseshoe(slab_scale=None)


def one_weight(mean, var):
    q = Diagonal(*(torch.tensor([v], dtype=torch.float64) for v in (mean, var)))
    p = Diagonal(
        torch.zeros(1, dtype=torch.float64), torch.full((1,), PRIOR_VAR, dtype=torch.float64)
    )
    return message(q, p), p.var


def brute_force(mean, var, tau, slab):
    """ΔF, κ, reduced mean and variance by Simpson's rule on a grid far finer than any peak."""
    precision = 1 / var - 1 / PRIOR_VAR
    m = mean / var / precision

    t = np.linspace(-45, 45, 900_001)  # log λ
    psi = tau**2 * np.exp(2 * t)
    v = psi if slab is None else psi * slab**2 / (psi + slab**2)
    density = stats.norm(0, np.sqrt(v + 1 / precision)).pdf(m) / (np.pi * np.cosh(t))

    def integral(f):
        return integrate.simpson(f(v) * density, x=t)

    evidence = integral(np.ones_like)
    kappa = integral(lambda v: 1 / (1 + precision * v)) / evidence
    reduced = (1 - kappa) * m
    second = (
        integral(lambda v: v / (1 + precision * v) + (precision * v / (1 + precision * v) * m) ** 2)
        / evidence
    )
    return (
        np.log(evidence) - stats.norm(0, np.sqrt(PRIOR_VAR + 1 / precision)).logpdf(m),
        kappa,
        reduced,
        second - reduced**2,
    )


@pytest.mark.parametrize("slab", others_slow([None, 0.8], 0.8))
@pytest.mark.parametrize(
    "mean, var, tau",
    [
        (0.35, 0.04, 0.2),
        (-1.9, 0.1, 0.2),
        (0.02, 0.3, 0.05),
        (0.9, 0.02, 1.3),
        (1.0, 0.0099, 1e-3),
        (0.3, 1e-3, 1e-4),
    ],
)
def test_one_weight_is_brute_force_quadrature(mean, var, tau, slab):  # (i)
    got = scale_mixture_reduction(
        *one_weight(mean, var), *bmr.Horseshoe(slab_scale=slab).mixture(tau)
    )
    expected = brute_force(mean, var, tau, slab)
    for value, reference, name in zip(
        (got.delta_f, got.kappa, got.mean, got.var),
        expected,
        ("ΔF", "κ", "mean", "var"),
        strict=True,
    ):
        assert value.item() == pytest.approx(reference, rel=1e-6, abs=1e-9), name


def test_a_published_value():
    got = scale_mixture_reduction(*one_weight(0.35, 0.04), *HORSESHOE.mixture(0.2))
    assert got.delta_f.item() == pytest.approx(0.4726937093190939, abs=1e-10)
    assert got.kappa.item() == pytest.approx(0.5149433036244783, abs=1e-10)
    assert got.mean.item() == pytest.approx(0.1744210723268143, abs=1e-10)


def test_tau_is_the_optimum_of_its_evidence():
    rng = np.random.default_rng(1)
    mean = np.where(rng.random(200) < 0.1, rng.normal(0, 1.2, 200), rng.normal(0, 0.1, 200))
    q = Diagonal(torch.tensor(mean), torch.full((200,), 0.01, dtype=torch.float64))
    p = Diagonal(
        torch.zeros(200, dtype=torch.float64), torch.full((200,), PRIOR_VAR, dtype=torch.float64)
    )
    data, prior = message(q, p), bmr.Horseshoe(0.5, slab_scale=None)

    def loss(log_tau):
        tau = np.exp(log_tau)
        return -scale_mixture_reduction(
            data, p.var, *HORSESHOE.mixture(tau)
        ).delta_f.sum().item() + np.log1p((tau / 0.5) ** 2)

    best = optimize.minimize_scalar(
        loss, bounds=(-9, 2), method="bounded", options={"xatol": 1e-5}
    ).x
    assert np.log(best_scale(data, p.var, prior.mixture, prior.log_hyper).item()) == pytest.approx(
        best, abs=2e-3
    )


def test_a_weight_without_information_keeps_the_prior():
    got = scale_mixture_reduction(
        *one_weight(0.4, 1.9), *bmr.Horseshoe(slab_scale=0.8).mixture(0.3)
    )
    assert got.delta_f.item() == pytest.approx(0, abs=1e-12)
    assert got.kappa.item() == pytest.approx(1, abs=1e-12) and got.mean.item() == 0.0


@pytest.mark.slow
def test_tau_of_a_large_layer_is_that_of_its_sample():
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    mean = torch.where(torch.rand(n, generator=generator) < 0.1, 1.2, 0.1).double() * torch.randn(
        n, generator=generator, dtype=torch.float64
    )
    p = Diagonal(
        torch.zeros(n, dtype=torch.float64), torch.full((n,), PRIOR_VAR, dtype=torch.float64)
    )
    data = message(Diagonal(mean, torch.full((n,), 0.01, dtype=torch.float64)), p)
    tau = best_scale(data, p.var, HORSESHOE.mixture, HORSESHOE.log_hyper).item()
    gain = [
        scale_mixture_reduction(data, p.var, *HORSESHOE.mixture(tau * factor)).delta_f.sum().item()
        for factor in (0.9, 1.0, 1.1)
    ]
    assert gain[1] > max(gain[0], gain[2])


def test_a_sample_counts_for_the_whole_layer():
    """Against a sharp hyper-prior the sampled third would lose: τ is that of all the weights, by
    scipy.
    """
    rng = np.random.default_rng(2)
    # what every third sees is what there is
    mean = np.tile(
        np.where(rng.random(100) < 0.2, rng.normal(0, 1.2, 100), rng.normal(0, 0.1, 100)), 200
    )
    p = Diagonal(
        torch.zeros(20_000, dtype=torch.float64),
        torch.full((20_000,), PRIOR_VAR, dtype=torch.float64),
    )
    data = message(
        Diagonal(torch.tensor(mean), torch.full((20_000,), 0.01, dtype=torch.float64)), p
    )
    few = Message(data.h[:100], data.precision[:100])

    def hyper(tau):
        return -5000 * np.log(tau) ** 2

    def loss(log_tau):
        return -200 * scale_mixture_reduction(
            few, p.var[:100], *HORSESHOE.mixture(np.exp(log_tau))
        ).delta_f.sum().item() - hyper(np.exp(log_tau))

    best = optimize.minimize_scalar(
        loss, bounds=(-6, 1), method="bounded", options={"xatol": 1e-5}
    ).x
    assert (
        np.log(best_scale(data, p.var, HORSESHOE.mixture, hyper).item())
        == pytest.approx(best, abs=2e-3)
        and best < -0.1
    )


def numbers(*values):
    return [torch.tensor(v, dtype=torch.float64) for v in values]


def weights(n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.where(torch.rand(n, generator=generator) < 0.3, 1.1, 0.1).to(dtype) * torch.randn(
        n, generator=generator, dtype=dtype
    )
    var = 0.01 + 0.2 * torch.rand(n, generator=generator, dtype=dtype)
    return Diagonal(mean, var), Diagonal(
        torch.zeros((), dtype=dtype), torch.tensor(PRIOR_VAR, dtype=dtype)
    )


def laplace_nodes(b):
    """v ~ Exp(mean 2b²): the density of a Laplace of scale b."""
    t = np.linspace(-40, 6, 700)
    log_w = t - np.exp(t)
    return 2 * b**2 * np.exp(t), log_w - np.logaddexp.reduce(log_w)


def student_nodes(df, scale):
    """1/v ~ Gamma(df/2, df scale²/2)."""
    t = np.linspace(-30, 30, 900)
    log_w = stats.gamma(df / 2, scale=2 / df).logpdf(np.exp(t)) + t
    return scale**2 * np.exp(-t), log_w - np.logaddexp.reduce(log_w)


@pytest.mark.parametrize(
    "nodes, density",
    [(laplace_nodes(0.4), stats.laplace(0, 0.4)), (student_nodes(3.5, 0.6), stats.t(3.5, 0, 0.6))],
    ids=["Laplace", "Student-t"],
)
def test_any_mixture_is_quadrature_over_the_weight(nodes, density):
    """The same ΔF and moments from the marginal density of the weight, by Simpson's rule from the
    kink outwards, without the mixture.
    """
    q, p = weights(5, seed=4)
    got = scale_mixture_reduction(message(q, p), p.var.expand(5), *nodes)
    half = np.linspace(0, 8, 40_001)
    m, s = q.mean.numpy()[:, None], q.var.numpy()[:, None] ** 0.5

    def integral(k):
        total = 0.0
        for w in (half, -half):
            ratio = np.exp(-0.5 * ((w - m) / s) ** 2 + 0.5 * w**2 / PRIOR_VAR) * PRIOR_VAR**0.5 / s
            total += integrate.simpson(w**k * ratio * density.pdf(w), x=half)
        return total

    evidence = integral(0)
    np.testing.assert_allclose(got.delta_f, np.log(evidence), atol=1e-7)
    np.testing.assert_allclose(got.mean, integral(1) / evidence, atol=1e-7)
    np.testing.assert_allclose(
        got.var, integral(2) / evidence - (integral(1) / evidence) ** 2, atol=1e-7
    )


def test_a_mixture_of_one_gaussian_is_the_gaussian_form():
    q, p = weights(40)
    target = Diagonal(*numbers(0.0, 0.37))
    got = scale_mixture_reduction(message(q, p), p.var.expand(40), [0.37], [0.0])
    torch.testing.assert_close(got.delta_f, bmr.delta_f(q, p, target), rtol=0, atol=1e-12)
    reduced = bmr.formulas.reduced_posterior(q, p, target)
    torch.testing.assert_close(got.mean, reduced.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.var, reduced.var, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        got.kappa, 1 / (1 + 0.37 * message(q, p).precision), rtol=0, atol=1e-12
    )


def test_a_group_of_one_is_a_weight_and_a_group_of_two_is_joint():
    q, p = weights(6, seed=2)
    data, var = message(q, p), p.var.expand(6)
    nodes = HORSESHOE.mixture(0.3)
    alone, single = (
        scale_mixture_reduction(data, var, *nodes),
        grouped_reduction(data, var, *nodes, torch.arange(6)),
    )
    for name in ("delta_f", "log_odds", "mean", "var"):
        torch.testing.assert_close(
            getattr(single, name), getattr(alone, name), rtol=1e-8, atol=1e-9
        )
    paired = grouped_reduction(data, var, *nodes, torch.tensor([0, 1, 0, 2, 1, 2]))
    t = np.linspace(-30, 30, 60_001)
    precision, h = data.precision.numpy(), data.h.numpy()
    v = 0.09 * np.exp(2 * t)[:, None]
    pair = [0, 2]
    log_ratio = stats.norm(0, np.sqrt(v + 1 / precision)).logpdf(h / precision) - stats.norm(
        0, np.sqrt(PRIOR_VAR + 1 / precision)
    ).logpdf(h / precision)
    density = np.exp(log_ratio[:, pair].sum(1)) / (np.pi * np.cosh(t))
    evidence = integrate.simpson(density, x=t)
    assert paired.delta_f[0].item() == pytest.approx(np.log(evidence), abs=1e-8)
    share = [
        integrate.simpson(density * v[:, 0] / (1 + v[:, 0] * precision[i]), x=t) / evidence
        for i in pair
    ]
    np.testing.assert_allclose(paired.mean[pair], h[pair] * share, rtol=1e-7)
    kappa = np.mean([1 - s * precision[i] for s, i in zip(share, pair, strict=True)])
    assert (
        paired.kappa[0].item() == pytest.approx(kappa, abs=1e-8)
        and paired.kappa[2] == paired.kappa[0]
    )


def test_tau_of_each_unit_is_that_of_the_unit_alone():
    q, p = weights(300, seed=5)
    q = Diagonal(q.mean * torch.tensor([0.2, 1.0, 3.0]).repeat_interleave(100), q.var)
    data, var, rows = message(q, p), p.var.expand(300), torch.arange(3).repeat_interleave(100)
    prior = bmr.Horseshoe(0.7)
    scales = best_scale(data, var, prior.mixture, prior.log_hyper, scale_groups=rows)
    for k in range(3):
        part = Message(data.h[rows == k], data.precision[rows == k])
        assert scales[k].item() == pytest.approx(
            best_scale(part, var[rows == k], prior.mixture, prior.log_hyper).item(), rel=2e-3
        )
    nodes = [prior.mixture(s) for s in scales.tolist()]
    got = scale_mixture_reduction(data, var, [v for v, _ in nodes], [w for _, w in nodes], rows)
    alone = scale_mixture_reduction(
        Message(data.h[100:200], data.precision[100:200]), var[100:200], *nodes[1]
    )
    for name in ("delta_f", "log_odds", "mean", "var"):
        torch.testing.assert_close(
            getattr(got, name)[100:200], getattr(alone, name), rtol=1e-7, atol=1e-9
        )


@pytest.mark.slow
def test_single_precision_is_double_precision():
    """Over signals from none to overwhelming, at τ from tiny to wide, with and without a slab."""
    z, precision = torch.meshgrid(
        torch.logspace(-2, 2.5, 34, dtype=torch.float64),
        torch.logspace(-4, 5, 34, dtype=torch.float64),
        indexing="ij",
    )
    data = Message((z * precision.sqrt()).flatten(), precision.flatten())
    for tau in (1e-4, 0.3):
        for prior in (bmr.Horseshoe(), HORSESHOE):
            double = scale_mixture_reduction(
                data, torch.full((1156,), PRIOR_VAR).double(), *prior.mixture(tau)
            )
            single = scale_mixture_reduction(
                Message(data.h.float(), data.precision.float()),
                torch.full((1156,), PRIOR_VAR),
                *prior.mixture(tau),
            )
            assert torch.allclose(single.delta_f.double(), double.delta_f, rtol=2e-5, atol=2e-5)
            assert torch.allclose(single.kappa.double(), double.kappa, rtol=1e-4, atol=1e-6)
            assert torch.allclose(single.mean.double(), double.mean, rtol=1e-3, atol=1e-6)
            assert torch.allclose(single.var.double(), double.var, rtol=1e-2, atol=1e-9)


extreme = st.floats(-15, 15).map(lambda x: 10.0**x)


def share_beyond(data, variances, log_weights):
    """Of each weight, how likely it comes from the widest node."""
    with mp.workdps(30):
        nodes = [
            (mp.mpf(v), mp.exp(w))
            for v, w in zip(variances.tolist(), log_weights.tolist(), strict=True)
        ]
        for h, precision in zip(*(t.double().tolist() for t in data), strict=True):
            if precision > 0:
                h, precision = mp.mpf(h), mp.mpf(precision)
                terms = [
                    w * mp.sqrt(x) * mp.exp(-(h**2) * x / (2 * precision))
                    for x, w in ((1 / (1 + v * precision), w) for v, w in nodes)
                ]
                yield float(terms[-1] / sum(terms))


@settings(max_examples=25, deadline=None)
@example(torch.float32, [(1e14, 1.0, False)], 10.0, 0.1, False)  # far out, and far from the end
@example(torch.float64, [(1e15, 1e-3, False), (1.0, 1.0, True)], 10.0, 1e-9, False)  # beyond it
@given(
    st.sampled_from([torch.float32, torch.float64]),
    st.lists(st.tuples(extreme, extreme, st.booleans()), min_size=1, max_size=5),
    extreme,
    extreme,
    st.booleans(),
)
def test_no_weight_is_nan(dtype, cases, prior_var, tau, slab):
    """Posteriors, priors and scales over thirty orders of magnitude: κ in [0, 1], variances not
    negative, nothing NaN.

    A warning comes if the widest node of a grid without a slab has more than 10⁻⁴ of a weight, and
    only then.
    """
    mean = torch.tensor([m if sign else -m for m, _, sign in cases], dtype=dtype)
    var = torch.tensor([v for _, v, _ in cases], dtype=dtype)
    data = message(
        Diagonal(mean, var), Diagonal(torch.zeros_like(mean), torch.full_like(mean, prior_var))
    )
    nodes = bmr.Horseshoe(slab_scale=2.0 if slab else None).mixture(tau)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = scale_mixture_reduction(data, torch.full_like(mean, prior_var), *nodes)
    assert (
        not any(t.isnan().any() for t in got)
        and ((got.kappa >= 0) & (got.kappa <= 1) & (got.var >= 0)).all()
    )
    assert all(t.dtype == dtype and t.shape == mean.shape for t in got)
    shares = [] if slab else list(share_beyond(data, *nodes))
    said = [int(str(w.message).partition(" of ")[0]) for w in caught]
    assert all("lie where the mixture ends" in str(w.message) for w in caught) and len(said) <= 1
    assert (
        sum(share > 1.01e-4 for share in shares)
        <= sum(said)
        <= sum(share > 0.99e-4 for share in shares)
    )


@pytest.mark.parametrize(
    ("slab", "dtype"),
    others_slow(
        [(slab, dtype) for slab in (None, 0.8) for dtype in (torch.float32, torch.float64)],
        (0.8, torch.float32),
    ),
)
def test_signals_of_any_strength(dtype, slab):
    """The exponents of all wide nodes agree in sixteen digits or more; which of them a weight comes
    from is in the others.
    """
    m = 10 ** np.linspace(-3, 14, 20)
    rows = (
        np.stack([0.9 * m, np.full(20, 0.9), np.full(20, 10.0)], 1)
        .astype(np.float32)
        .astype(np.float64)
    )
    nodes = bmr.Horseshoe(slab_scale=slab).mixture(0.1)
    with mp.workdps(90):
        exact = [
            (mp.mpf(v), mp.exp(w)) for v, w in zip(*map(np.ndarray.tolist, nodes), strict=True)
        ]
        want = np.array(
            [[float(x) for x in mixtures.by_nodes(*row, exact)] for row in rows.tolist()]
        )
    data, prior_var = (
        Message(*torch.tensor(rows.T[:2], dtype=dtype)),
        torch.full((20,), 10.0, dtype=dtype),
    )
    grouped = grouped_reduction(data, prior_var, *nodes, torch.arange(20))
    many = scale_mixture_reduction(
        Message(data.h.repeat(30), data.precision.repeat(30)), prior_var.repeat(30), *nodes
    )
    for got in (scale_mixture_reduction(data, prior_var, *nodes), grouped, many):
        for k, name in enumerate(("delta_f", "log_odds", "mean", "var")):
            within = 2e-5 if dtype == torch.float32 or (name == "var" and got is many) else 1e-8
            np.testing.assert_allclose(
                getattr(got, name)[:20].double(),
                want[:, k],
                rtol=within,
                atol=within if k < 2 else 0,
                err_msg=name,
            )


def test_what_a_mixture_must_be():
    data, var = one_weight(0.3, 0.1)
    with pytest.raises(
        bmr.errors.ReductionError, match=r"variances >= 0.*shapes \(2,\) and \(1,\)"
    ):
        scale_mixture_reduction(data, var, [1.0, 2.0], [0.0])
    for empty in ([], np.zeros((1, 0))):
        with pytest.raises(bmr.errors.ReductionError, match="no variances"):
            scale_mixture_reduction(
                data, var, empty, empty, torch.zeros(1, dtype=torch.long) if len(empty) else None
            )
    with pytest.raises(bmr.errors.ReductionError, match="variances from -1.0"):
        scale_mixture_reduction(data, var, [-1.0], [0.0])
    with pytest.raises(bmr.errors.ReductionError, match="scale_groups or groups, got both"):
        best_scale(
            data,
            var,
            HORSESHOE.mixture,
            HORSESHOE.log_hyper,
            torch.zeros(1, dtype=torch.long),
            torch.zeros(1, dtype=torch.long),
        )


def group_of(n):
    """The message of n weights that share a scale, and their prior variances."""
    mean = 0.7 * torch.randn(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    q = Diagonal(mean, torch.full((n,), 1e-4, dtype=torch.float64))
    p = Diagonal(torch.zeros(n, dtype=torch.float64), torch.full((n,), 1.5, dtype=torch.float64))
    return message(q, p), p.var, torch.zeros(n, dtype=torch.long)


def log_grid(gap):
    """A log-normal mixing density on a grid with this distance in log v."""
    log_v = np.arange(-9.0, 9.0, gap)
    return np.exp(log_v), -0.5 * (log_v / 2) ** 2 - special.logsumexp(-0.5 * (log_v / 2) ** 2)


def test_a_grid_too_coarse_for_a_group_says_so():
    data, var, groups = group_of(800)  # √(2/800) = 0.05
    with pytest.warns(bmr.PyroBMRWarning, match=r"1 of 1 groups .* are 0\.5 apart .* to 0\.05;"):
        coarse = grouped_reduction(data, var, *log_grid(0.5), groups)
    fine, finer = (grouped_reduction(data, var, *log_grid(gap), groups) for gap in (0.05, 0.01))
    assert fine.delta_f.item() == pytest.approx(finer.delta_f.item(), abs=1e-6)
    assert abs(coarse.delta_f.item() - fine.delta_f.item()) > 0.1


def test_few_weights_or_a_few_gaussians_far_apart_are_no_coarse_grid():
    for n, gap in ((4, 0.5), (30, 0.2)):  # warnings are errors
        data, var, groups = group_of(n)
        got = grouped_reduction(data, var, *log_grid(gap), groups).delta_f.item()
        fine = grouped_reduction(data, var, *log_grid(0.01), groups).delta_f.item()
        assert got == pytest.approx(fine, abs=1e-3)
    data, var, groups = group_of(800)
    for count in (3, 15):
        v = np.exp(np.arange(count) * 2.0 - 12.0)
        grouped_reduction(data, var, v, np.full(count, -math.log(count)), groups)
