"""Reductions of single weights held against tables of 2,000 rows each, made by
tests/reference/mixtures.py, in single and in double precision.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.formulas import spike_and_slab
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.laplace import laplace_reduction
from pyro_bmr.formulas.message import Message
from pyro_bmr.formulas.scale_mixture import grouped_reduction, scale_mixture_reduction
from pyro_bmr.formulas.spike_and_slab import exact_inclusion
from pyro_bmr.posteriors.site import Site
from pyro_bmr.reduction.reduced_site import site_reduction
from tests.reference import inclusion
from tests.reference import mixtures as reference

TABLES = np.load(Path(reference.__file__).with_suffix(".npz"))
PRIORS = {
    "student": [bmr.StudentT(df, scale) for df, scale in reference.STUDENT],
    "horseshoe": [bmr.Horseshoe(tau, slab_scale=None) for tau in reference.TAUS],
    "regularised": [bmr.Horseshoe(tau, slab_scale=reference.SLAB) for tau in reference.TAUS],
}
WITHIN = {torch.float32: (1e-4, 1e-5), torch.float64: (1e-7, 1e-8)}  # relative, nats
DTYPES = [torch.float32, torch.float64]


def columns(table, dtype):
    return [torch.tensor(column, dtype=dtype) for column in table.T]


def held(got, table, dtype):
    """ΔF and logit κ to so many nats or relatively, moments relatively."""
    relative, nats = WITHIN[dtype]
    for name, want in zip(("delta_f", "log_odds", "mean", "var"), table.T[4:], strict=True):
        have, want = (
            getattr(got, name).double().numpy(),
            torch.tensor(want).to(dtype).double().numpy(),
        )
        assert getattr(got, name).dtype == dtype
        np.testing.assert_allclose(
            have,
            want,
            rtol=relative,
            atol=nats if name in ("delta_f", "log_odds") else 0,
            err_msg=name,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_laplace(dtype):
    table = TABLES["laplace"]
    h, precision, var, scale = columns(table[:, :4], torch.float64)
    got = laplace_reduction(Message(h.to(dtype), precision.to(dtype)), var.to(dtype), scale)
    held(got, table, dtype)
    np.testing.assert_allclose(
        got.kappa.double(), 1 / (1 + np.exp(-table[:, 5])), rtol=WITHIN[dtype][0]
    )


@pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param(n, d, marks=pytest.mark.slow)
        if (n, d) == ("student", torch.float32)
        else (n, d)
        for n in PRIORS
        for d in DTYPES
    ],
)
def test_mixtures(name, dtype):
    for k, prior in enumerate(PRIORS[name]):
        # so many that they are not taken one by one
        table = np.tile(TABLES[name][reference.part(k)], (3, 1))
        h, precision, var, _ = columns(table[:, :4], dtype)
        held(scale_mixture_reduction(Message(h, precision), var, *prior.mixture()), table, dtype)


@pytest.mark.parametrize("name", PRIORS)
def test_the_tables_are_those_of_mpmath(name):
    rng = np.random.default_rng(11)
    for k in rng.choice(reference.SCALES, 3, replace=False):
        row = TABLES[name][reference.part(k)][rng.integers(200)].tolist()
        np.testing.assert_allclose(
            reference.at_30_digits(name, k, row), row[4:], rtol=1e-12, atol=1e-14
        )


def test_the_table_of_laplace_is_that_of_mpmath():
    for row in np.random.default_rng(3).permutation(TABLES["laplace"])[:40].tolist():
        np.testing.assert_allclose(
            list(map(float, reference.laplace(*row[:4]))), row[4:], rtol=1e-13
        )


def test_reduce_has_the_laplace_of_the_formula():
    """Three thousand times b from zero: the closed form by mpmath, through every public way; known
    and looked-for scales, groups.
    """
    want = -2938.661, 2.90029
    q, p = (
        Diagonal(*torch.tensor([[3.0], [1e-4]], dtype=torch.float64)),
        Diagonal(*torch.tensor([0.0, 1.0], dtype=torch.float64)),
    )
    row = [q.mean.item() / q.var.item(), 1 / q.var.item() - 1, 1.0]
    exact = list(map(float, reference.laplace(*row, 1e-3)))
    assert exact[0] == pytest.approx(want[0], abs=1e-3) and exact[2] == pytest.approx(
        want[1], abs=1e-5
    )
    direct = scale_mixture_reduction(
        bmr.formulas.message(q, p), p.var, *bmr.Laplace(1e-3).mixture()
    )
    reduced = bmr.reduce(bmr.Posterior({"w": Site(q.mean, q.var, p)}), to=bmr.Laplace(1e-3))
    alone = site_reduction(
        bmr.Posterior({"w": Site(q.mean, q.var, p)}),
        "w",
        bmr.Laplace(1e-3),
        torch.zeros(1, dtype=torch.long),
    )
    for delta_f, mean in (
        (direct.delta_f.item(), direct.mean.item()),
        (reduced.delta_f, reduced.posterior["w"].mean.item()),
        (alone.delta_f, alone.site.mean.item()),
    ):
        assert delta_f == pytest.approx(exact[0], abs=1e-6) and mean == pytest.approx(
            exact[2], rel=1e-9
        )
    found = site_reduction(bmr.Posterior({"w": Site(q.mean, q.var, p)}), "w", bmr.Laplace())
    assert found.delta_f == pytest.approx(float(reference.laplace(*row, found.scale)[0]), abs=1e-9)
    assert all(
        found.delta_f - math.log1p(found.scale**2)
        >= float(reference.laplace(*row, found.scale * f)[0]) - math.log1p((found.scale * f) ** 2)
        for f in (0.9, 1.1)
    )


def test_a_grid_that_ends_before_a_weight_says_so():
    data, var = (
        Message(*torch.tensor([[2.0, 900.0], [10.0, 10.0]], dtype=torch.float64)),
        torch.ones(2, dtype=torch.float64),
    )
    t = np.arange(-8.0, 4.0, 0.2)
    log_w = -np.logaddexp(t, -t)
    narrow = np.exp(2 * t), log_w - np.logaddexp.reduce(log_w)
    with pytest.warns(
        bmr.PyroBMRWarning, match="1 of 2 weights lie where the mixture ends.*wider nodes"
    ):
        scale_mixture_reduction(data, var, *narrow)
    with pytest.warns(bmr.PyroBMRWarning, match="1 of 2 groups"):
        grouped_reduction(data, var, *narrow, torch.arange(2))
    with pytest.warns(bmr.PyroBMRWarning, match="1 of 2 weights"):
        scale_mixture_reduction(
            Message(data.h * 1e4, data.precision * 1e4), var, *bmr.Laplace(1e-3).mixture()
        )
    # two Gaussians are what the prior is, however far the weight
    scale_mixture_reduction(data, var, [0.04, 1.3], np.log([0.7, 0.3]))
    with pytest.raises(bmr.errors.ReductionError, match="sum to 1"):
        scale_mixture_reduction(data, var, [0.04, 1.3], [0.0, 0.0])
    with pytest.raises(bmr.errors.ReductionError, match="1 h and 0 precisions"):
        laplace_reduction(Message(data.h * torch.tensor([1.0, math.inf]), data.precision), var, 1.0)


@pytest.mark.parametrize(
    "prior",
    [
        pytest.param(bmr.Horseshoe(0.3, slab_scale=None), id="horseshoe", marks=pytest.mark.slow),
        pytest.param(bmr.StudentT(4.0, 0.3), id="student"),
        pytest.param(bmr.Laplace(0.3), id="laplace", marks=pytest.mark.slow),
    ],
)
def test_many_weights_of_one_scale_need_close_nodes(prior):
    """Six hundred weights of a group: ΔF by Simpson's rule over the logarithm of their scale, far
    finer than its posterior.
    """
    generator = torch.Generator().manual_seed(0)
    q = Diagonal(
        0.4 * torch.randn(600, generator=generator, dtype=torch.float64),
        torch.full((600,), 0.01, dtype=torch.float64),
    )
    data = bmr.formulas.message(q, Diagonal(*torch.tensor([0.0, 1.5], dtype=torch.float64)))
    density = {
        "Horseshoe": (
            lambda u: -np.log(np.pi) - np.logaddexp(u - np.log(0.3), np.log(0.3) - u) + np.log(2)
        )
    }
    density["StudentT"] = lambda u: (
        2 * np.log(2)
        + 2 * (2 * np.log(0.3) - 2 * u)
        - 2 * np.exp(2 * np.log(0.3) - 2 * u)
        + np.log(2)
    )
    density["Laplace"] = lambda u: 2 * u - np.log(2 * 0.09) - np.exp(2 * u) / (2 * 0.09) + np.log(2)
    u = np.linspace(-6, 4, 20_001)
    v, h, precision = np.exp(2 * u)[:, None], data.h.numpy(), data.precision.numpy()
    terms = (
        0.5 * np.log((1 + 1.5 * precision) / (1 + v * precision))
        + 0.5 * h**2 * (v / (1 + v * precision) - 1.5 / (1 + 1.5 * precision))
    ).sum(1)
    log_f = terms + density[type(prior).__name__](u)
    want = log_f.max() + np.log(np.exp(log_f - log_f.max()).sum() * (u[1] - u[0]))
    nodes = prior.mixture(together=600)
    got = grouped_reduction(
        data, torch.tensor(1.5, dtype=torch.float64), *nodes, torch.zeros(600, dtype=torch.long)
    )
    assert got.delta_f.item() == pytest.approx(want, abs=1e-6)
    p = Diagonal(*torch.tensor([0.0, 1.5], dtype=torch.float64))
    if not hasattr(prior, "log_hyper"):
        assert site_reduction(
            bmr.Posterior({"w": Site(q.mean, q.var, p)}),
            "w",
            prior,
            torch.zeros(600, dtype=torch.long),
        ).delta_f == pytest.approx(want, abs=1e-6)


INCLUSION = np.load(Path(inclusion.__file__).with_suffix(".npz"))["inclusion"]


@pytest.mark.parametrize(
    ("part", "parts"), [(0, 32), *(pytest.param(k, 8, marks=pytest.mark.slow) for k in range(8))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inclusion_of_any_evidence(dtype, part, parts):
    """2,000 problems, 63 of them in the fast suite, also with Beta priors of 10^±200."""
    within = 1e-8 if dtype == torch.float64 else 1e-6
    for alpha, beta, gain, log_odds, *rest in INCLUSION[part::parts].tolist():
        d, drops = (
            np.array(half)[~np.isnan(half)]
            for half in (rest[: inclusion.MOST], rest[inclusion.MOST :])
        )
        got = exact_inclusion(torch.tensor(d, dtype=dtype), alpha, beta)
        have = [got.log_evidence_gain.item(), got.log_odds.item(), *got.drop_log_odds.tolist()]
        np.testing.assert_allclose(
            have,
            [gain, log_odds, *drops],
            rtol=within,
            atol=within,
            err_msg=f"{d}, {alpha}, {beta}",
        )


def test_the_table_of_inclusion_is_that_of_mpmath():
    for k in np.random.default_rng(2).choice(inclusion.PROBLEMS, 40, replace=False).tolist():
        (d, alpha, beta), row = inclusion.problem(k), INCLUSION[k]
        row = row[~np.isnan(row)]
        np.testing.assert_allclose([alpha, beta, *d], [*row[:2], *row[4 : 4 + len(d)]], rtol=0)
        np.testing.assert_allclose(
            inclusion.inclusion(d, alpha, beta), [*row[2:4], *row[4 + len(d) :]], rtol=1e-14
        )


def test_an_integral_that_does_not_settle_says_so(monkeypatch):
    monkeypatch.setattr(spike_and_slab, "_MOST_NODES", 20)
    monkeypatch.setattr(spike_and_slab, "_QUADRATURE_NODES", 5)
    delta_f = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64).repeat(40)
    with pytest.warns(
        bmr.PyroBMRWarning,
        match=r"after \d+ nodes the log evidence gain still changes by [\d.e-]+ nats, more than"
        r" 1e-05",
    ) as caught:
        got = exact_inclusion(delta_f, 2.0, 3.0)
    said = float(str(caught[0].message).partition("changes by ")[2].split()[0])
    monkeypatch.undo()
    off = abs(got.log_evidence_gain - exact_inclusion(delta_f, 2.0, 3.0).log_evidence_gain).item()
    assert said > 1e-5 and off < said and len(caught) == 1 and caught[0].filename == __file__


def test_inclusion_at_the_ends():
    huge = exact_inclusion(torch.tensor([1e30, -1e30, 0.0, -math.inf], dtype=torch.float64))
    assert (
        huge.drop_log_odds[:2].tolist() == [1e30, -1e30]
        and huge.drop_log_odds[3] == -math.inf
        and huge.log_evidence_gain == 1e30
    )
    # one weight alone under Beta(1, 1)
    assert exact_inclusion(torch.tensor([5000.0])).drop_log_odds.tolist() == [5000.0]
    empty = exact_inclusion(torch.zeros(0), 3.0, 2.0)
    assert (
        empty.drop_log_odds.shape == (0,)
        and empty.log_evidence_gain == 0
        and empty.log_odds.item() == pytest.approx(math.log(1.5))
    )
    for wrong in (math.inf, math.nan):
        with pytest.raises(bmr.errors.ReductionError, match=r"below \+∞, got \d NaN, \d \+∞"):
            exact_inclusion(torch.tensor([wrong, 1.0]))
    with pytest.raises(bmr.errors.ReductionError, match="finite alpha and beta > 0, got inf"):
        exact_inclusion(torch.zeros(2), alpha=math.inf)
    with pytest.raises(
        bmr.errors.ReductionError,
        match="alpha / beta between 1e-250 and 1e250, got alpha=1e-200, beta=1e\\+60",
    ):
        exact_inclusion(torch.zeros(2), 1e-200, 1e60)
