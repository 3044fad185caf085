"""Regressions whose evidence is known: what a sum over independent weights promises, what the joint
evidence gives, and when a warning says so.
"""

import re
import warnings

import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.formulas.matrix_normal import MatrixNormal
from pyro_bmr.posteriors.site import Site

NOISE, PRIOR = 0.6, 1.3


def regression(n, p, sites=1):
    """The exact posterior mean and precision of y = Xw + ε, w ~ N(0, PRIOR²), and the log evidence
    of a subset of the coefficients.
    """
    g = torch.Generator().manual_seed(4)
    x = torch.randn(n, p, generator=g, dtype=torch.float64)
    w = torch.zeros(p, dtype=torch.float64)
    w[:4] = torch.tensor([2.0, -2.0, 1.5, 2.5])
    y = x @ w + NOISE * torch.randn(n, generator=g, dtype=torch.float64)
    curvature = x.T @ x / NOISE**2
    precision = curvature + torch.eye(p, dtype=torch.float64) / PRIOR**2

    def log_evidence(kept):
        cov = PRIOR**2 * x[:, kept] @ x[:, kept].T + NOISE**2 * torch.eye(n, dtype=torch.float64)
        return float(
            torch.distributions.MultivariateNormal(
                torch.zeros(n, dtype=torch.float64), cov
            ).log_prob(y)
        )

    return torch.linalg.solve(precision, x.T @ y / NOISE**2), curvature, log_evidence


def change(reduction, log_evidence):
    kept = reduction.masks["w"]
    return log_evidence(kept) - log_evidence(torch.ones_like(kept))


def diagonal(mean, curvature, rows):
    return bmr.Posterior.from_curvature(
        {"w": mean}, {"w": curvature.diagonal()}, bmr.Gaussian(PRIOR), rows=rows
    )


def said(posterior, to=None, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reduction = bmr.reduce(posterior, to=bmr.Gaussian(scale=0) if to is None else to, **kwargs)
    assert [str(w.message) for w in caught] == list(reduction.warnings) and all(
        w.category is bmr.PyroBMRWarning for w in caught
    )
    return reduction, " | ".join(reduction.warnings)


def test_more_parameters_than_rows_are_told():
    mean, curvature, log_evidence = regression(40, 160)
    reduction, words = said(diagonal(mean, curvature, 40))
    truth = change(reduction, log_evidence)
    assert abs(reduction.delta_f - truth) > 50  # what the warning is about
    gone = int((~reduction.masks["w"]).sum())
    assert re.search(
        rf"ΔF = \{reduction.delta_f:+.4g} nats is a sum over {gone} terms .*parameters > rows \(160"
        r" > 40\)",
        words,
    )
    unknown = said(diagonal(mean, curvature, None))[1]
    assert (
        f"a sum over {gone} terms" in unknown and "160 parameters" in unknown and "rows=" in unknown
    )
    assert said(diagonal(mean, curvature, 160))[1] == ""  # no more parameters than rows


def test_fewer_parameters_than_rows_are_not():
    mean, curvature, log_evidence = regression(400, 12)
    for rows in (400, None):
        reduction, words = said(diagonal(mean, curvature, rows))
        assert (
            words == ""
            and int((~reduction.masks["w"]).sum()) > 0
            and abs(reduction.delta_f - change(reduction, log_evidence)) < 3
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"search": None},
        {"kept": 0.3},
        {"kept": {"w": 0.3}},
        {"threshold": 0.2},
        {"per": {"w": torch.arange(60) // 3}},
        {"kept": 0.3, "search": None},
    ],
)
def test_joint_evidence_is_exact_whatever_decides(options):
    mean, curvature, log_evidence = regression(30, 60)
    posterior = bmr.Posterior.from_curvature(
        {"w": mean}, {"w": curvature}, bmr.Gaussian(PRIOR), rows=30
    )
    reduction, words = said(posterior, **options)
    assert words == "" and not reduction.masks["w"].all()
    assert reduction.delta_f == pytest.approx(change(reduction, log_evidence), abs=1e-6)


def test_a_few_parameters_in_a_wide_posterior_are_not_told():
    """What a fit with reductions in rounds leaves: few living weights; and one weight is no sum."""
    mean, curvature, _ = regression(40, 160)
    posterior = diagonal(mean, curvature, 40)
    living = posterior.masked({"w": torch.arange(160) < 30})
    assert said(living)[1] == "" and living.rows == 40
    assert said(posterior, kept=159 / 160)[1] == ""
    assert "2 terms" in said(posterior, kept=158 / 160)[1]


@pytest.mark.parametrize(
    "to",
    [
        bmr.SpikeAndSlab(),
        bmr.SpikeAndSlab(slab_scale=0.7),
        bmr.Horseshoe(),
        bmr.Gaussian(0.4),
        bmr.Gaussian(),
    ],
)
def test_sums_of_other_targets_are_told_too(to):
    mean, curvature, _ = regression(8, 12)
    independent, joint = (
        bmr.Posterior.from_curvature({"w": mean}, {"w": h}, bmr.Gaussian(PRIOR), rows=8)
        for h in (curvature.diagonal(), curvature)
    )
    assert (
        "12 terms taken as independent, with parameters > rows (12 > 8)" in said(independent, to)[1]
    )
    words = said(joint, to)[1]
    if isinstance(to, bmr.Gaussian):
        assert words == ""  # exact with correlations
    else:
        assert "site 'w': the posterior has correlations, but ΔF is a sum over 12 terms" in words
    assert said(independent, threshold=1e9)[1] == ""  # nothing goes


def test_single_weights_of_a_matrix_normal_are_joint_under_a_spike_alone():
    g = torch.Generator().manual_seed(1)
    mean = 0.3 * torch.randn(4, 3, generator=g, dtype=torch.float64)
    rows, columns = (torch.eye(k, dtype=torch.float64) * 0.2 + 0.1 for k in (4, 3))
    var = rows.diagonal()[:, None] * columns.diagonal()
    prior = bmr.formulas.Diagonal(torch.tensor(0.0).double(), torch.tensor(1.7).double())
    posterior = bmr.Posterior(
        {"w": Site(mean, var, prior, joint=MatrixNormal(mean, rows, columns))}, rows=1000
    )
    # the point spike is joint, the evidence of a spike and slab is a sum
    assert said(posterior, kept=0.5)[1] == ""
    assert said(posterior, per="unit", kept=0.5)[1] == ""
    assert (
        "site 'w': the posterior has correlations, but ΔF is a sum over 12 terms"
        in said(posterior, bmr.SpikeAndSlab(), kept=0.5)[1]
    )


def test_sites_that_are_joint_each_are_terms_of_one_sum():
    mean, curvature, _ = regression(30, 60)
    halves = {"a": slice(0, 30), "b": slice(30, 60)}
    posterior = bmr.Posterior.from_curvature(
        {k: mean[s] for k, s in halves.items()},
        {k: curvature[s, s] for k, s in halves.items()},
        bmr.Gaussian(PRIOR),
        rows=30,
    )
    both, words = said(posterior)
    assert "a sum over 2 terms taken as independent, with parameters > rows (60 > 30)" in words
    assert (
        both.only("a").warnings == ()
        and both.only("a").then(both.only("b")).warnings == both.warnings
    )


def test_the_terms_of_two_reductions_of_one_site_add_up():
    mean, curvature, _ = regression(40, 160)
    first = said(diagonal(mean, curvature, 40), kept=0.5)[0]
    both = first.then(said(first.posterior, kept=0.25)[0])
    assert both.masks["w"].sum() == 40 and "a sum over 120 terms" in " | ".join(both.warnings)


def test_rows_are_kept_and_refused(tmp_path):
    mean, curvature, _ = regression(20, 5)
    posterior = diagonal(mean, curvature, 20)
    posterior.save(tmp_path / "p.safetensors")
    assert bmr.Posterior.load(tmp_path / "p.safetensors").rows == 20
    diagonal(mean, curvature, None).save(tmp_path / "p.safetensors")
    assert bmr.Posterior.load(tmp_path / "p.safetensors").rows is None
    draws = bmr.Posterior.from_samples({"w": torch.randn(9, 3)}, bmr.Gaussian(1.0), rows=7)
    assert (
        draws.rows == 7
        and draws.widened(2.0).rows == 7
        and bmr.reduce(draws, to=bmr.Gaussian(scale=0)).posterior.rows == 7
    )
    for wrong in (0, 2.5, True, "9", torch.ones(300)):
        with pytest.raises(bmr.errors.ModelError, match="rows=.*an integer >= 1"):
            diagonal(mean, curvature, wrong)
