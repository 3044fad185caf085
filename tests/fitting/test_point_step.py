"""The step of a MAP fit against the same numbers by autograd through Pyro's traces."""

import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.fitting.elbo import terms_of
from pyro_bmr.fitting.point_step import PointStep
from tests.fitting.test_written_weights import (
    GRID,
    PRIORS,
    ROWS,
    TEMPERATURE,
    X,
    Y,
    in_the_fast_suite,
    masks_for,
    network,
)
from tests.parameters import others_slow


def check(program, y, masks=None):
    """Compares a step at a random point."""
    guide = bmr.Point(program, X, y)
    with torch.no_grad():
        guide.loc += 0.3 * torch.randn_like(guide.loc)
    trained = [guide.loc, *program.trained]
    step = PointStep(program, guide, ROWS, TEMPERATURE, trained, program, (X, y))
    step.prune(masks or {})
    draw = step.run((X, y), 1)
    step.write_gradients(draw)
    given = [
        torch.cat([leaf.grad.flatten() for leaf in step.leaves.values()]),
        *(parameter.grad.clone() for parameter in program.trained),
    ]
    run, of_guide = program, guide
    if masks:
        run, of_guide = bmr.Masked(masks)(program), bmr.Masked(masks)(guide)
    likelihood, kl = terms_of(run, of_guide, (X, y), {})
    expected = torch.autograd.grad((TEMPERATURE * kl - likelihood) / ROWS, trained)
    assert draw.expected_log_likelihood == pytest.approx(likelihood.item(), rel=1e-10)
    assert draw.kl == pytest.approx(kl.item(), rel=1e-10)
    for own, other in zip(given, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-13)
    return step


@pytest.mark.parametrize(
    "prior",
    others_slow(PRIORS, *(p for p in PRIORS if in_the_fast_suite(p, True) or p not in GRID)),
    ids=lambda prior: repr(prior)[:120],
)
def test_value_and_gradient_are_those_of_autograd(prior):
    step = check(network(prior), Y)
    assert not step.others, "nothing is left to Pyro"


@pytest.mark.parametrize("likelihood", [bmr.Normal(size=ROWS), bmr.Normal(0.8, ROWS)], ids=repr)
@pytest.mark.parametrize("prior", [bmr.Gaussian(0.7), bmr.Horseshoe()], ids=repr)
def test_a_likelihood_with_a_site_of_its_own(prior, likelihood):
    step = check(network(prior, likelihood), X[:, :3].sin())
    assert [site.name for site in step.others] == ["noise"]


def test_parameters_that_are_left_and_several_priors():
    priors = {"one.*": None, "*.bias": bmr.Gaussian("layer"), "*": bmr.SpikeAndSlab()}
    check(network(priors), Y)


def test_masks():
    program = network(bmr.Gaussian("layer"))
    check(program, Y, masks_for(bmr.Point(program, X, Y)))


def test_a_fit_takes_it_where_all_priors_are_written_out(monkeypatch):
    taken = []
    monkeypatch.setattr(PointStep, "_write", lambda self, factor: taken.append(factor))
    program = network(bmr.Laplace(), bmr.Categorical())
    with pytest.warns(bmr.errors.PyroBMRWarning, match="not converged"):
        bmr.fit(program, (X, Y), guide=bmr.Point, epochs=2, temperature=0.5, progress=False)
    assert taken == [0.5 / 9] * 2
