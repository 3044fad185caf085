"""The mask handler under SVI, NUTS and Predictive; the schedule of reductions."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_bmr as bmr

TRUE = torch.tensor([1.5, 0.0, -1.0, 0.0])
X = torch.randn(60, 4, generator=torch.Generator().manual_seed(3))
Y = X @ TRUE + 0.5 * torch.randn(60, generator=torch.Generator().manual_seed(4))
MASKS = {"w": torch.tensor([True, False, True, False])}


def program(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.3).to_event(1))
    pyro.deterministic("used", w)
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def test_value_density_and_kl_of_masked_entries_are_exactly_zero():
    trace = poutine.trace(bmr.Masked(MASKS)(program)).get_trace(X, Y)
    site = trace.nodes["w"]
    used = trace.nodes["used"]["value"]
    assert used[1] == used[3] == 0 and used[0] != 0
    expected = dist.Normal(0.0, 1.3).log_prob(used[[0, 2]]).sum()
    assert site["fn"].log_prob(used).item() == pytest.approx(expected.item(), abs=1e-6)
    guide = bmr.MeanField(program, X, Y)
    guide_site = poutine.trace(bmr.Masked(MASKS)(guide)).get_trace(X, Y).nodes["w"]
    kl = torch.distributions.kl_divergence(guide_site["fn"], site["fn"])
    scales = guide.log_scale.detach().exp()[[0, 2]]
    by_hand = torch.distributions.kl_divergence(
        dist.Normal(torch.zeros(2), scales), dist.Normal(0.0, 1.3)
    ).sum()
    assert kl.item() == pytest.approx(by_hand.item(), abs=1e-5)


@pytest.mark.parametrize(
    "elbo", [pytest.param(Trace_ELBO, marks=pytest.mark.slow), TraceMeanField_ELBO]
)
def test_plain_svi_under_a_mask(elbo):
    """MeanField in Pyro's own loop: pruned coefficients get no gradient, the others their
    posterior.
    """
    guide = bmr.MeanField(program, X, Y)
    before = guide.log_scale.detach().clone()
    handler = bmr.Masked(MASKS)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.03)
    for _ in range(250):
        optimiser.zero_grad()
        elbo().differentiable_loss(handler(program), handler(guide), X, Y).backward()
        optimiser.step()
    moved = (guide.log_scale.detach() - before).abs() > 0.1
    assert moved.tolist() == MASKS["w"].tolist()
    kept = X[:, MASKS["w"]]
    precision = kept.T @ kept / 0.25 + torch.eye(2) / 1.69
    torch.testing.assert_close(
        guide.loc.detach()[MASKS["w"]],
        torch.linalg.solve(precision, kept.T @ Y / 0.25),
        atol=0.04,
        rtol=0,
    )


@pytest.mark.slow
def test_autonormal_under_a_mask_converges():
    handler = bmr.Masked(MASKS)
    guide = AutoNormal(program)
    svi = SVI(handler(program), handler(guide), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(250):
        svi.step(X, Y)
    median = guide.median()["w"]
    assert median[0].item() == pytest.approx(1.5, abs=0.25) and median[2].item() == pytest.approx(
        -1.0, abs=0.25
    )
    trace = poutine.trace(handler(guide)).get_trace(X, Y)
    assert not trace.nodes["w"]["value"][~MASKS["w"]].any()


@pytest.mark.slow
def test_nuts_respects_the_mask_and_stays_put():
    handled = bmr.Masked(MASKS)(program)
    # 1.5 within 0.25, about twenty standard errors
    sampler = MCMC(NUTS(handled), num_samples=40, warmup_steps=30, disable_progbar=True)
    sampler.run(X, Y)
    samples = sampler.get_samples()["w"]
    assert samples[:, 0].mean().item() == pytest.approx(1.5, abs=0.25)
    # dead coordinates are held by a quadratic, they do not drift
    assert samples[:, [1, 3]].abs().max() < 6
    used = Predictive(handled, {"w": samples}, return_sites=["used"])(X)["used"]
    assert not used[..., [1, 3]].any() and torch.equal(used[..., 0].flatten(), samples[:, 0])


def test_predictive_from_the_prior():
    used = Predictive(bmr.Masked(MASKS)(program), num_samples=50, return_sites=["w"])(X)["w"]
    assert not used[..., [1, 3]].any() and used[..., 0].std() > 0.5


def test_masks_that_do_not_fit_are_named():
    for bad in (torch.ones(3, dtype=torch.bool), torch.ones(4)):
        with pytest.raises(bmr.errors.ReductionError, match=r"mask of site 'w'.*shape \(4,\)"):
            bmr.Masked({"w": bad})(program)(X, Y)

    def joint():
        pyro.sample("w", dist.MultivariateNormal(torch.zeros(4), torch.eye(4)))

    with pytest.raises(
        bmr.errors.ReductionError, match="site 'w'.*MultivariateNormal does not split"
    ):
        bmr.Masked(MASKS)(joint)()


def test_schedule_steps():
    def steps(schedule, total=100):
        return {k for k in range(1, total + 1) if schedule.is_due(k, total, steps_per_epoch=10)}

    assert steps(bmr.Every(epochs=2, start=0.2, stop=0.8)) == {20, 40, 60, 80}
    assert steps(bmr.Every(epochs=0.25, start=0, stop=0.1)) == {2, 5, 8, 10}
    # the target is reached even between two marks
    assert 75 in steps(bmr.Every(epochs=40, kept=0.1))
    # a tenth of the fit
    assert steps(bmr.Every(stop=0.4), 70) == {7, 14, 21, 28}


def test_cubic_schedule():
    schedule = bmr.Every(kept=0.05, start=0.1, stop=0.7)
    assert schedule.target(0.05) == 1.0 and schedule.target(0.7) == pytest.approx(
        0.05
    ) == schedule.target(0.9)
    assert schedule.target(0.4) == pytest.approx(0.05 + 0.95 * 0.125)
    assert bmr.Every().target(0.5) is None


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"start": 0.8, "stop": 0.2}, {"kept": -0.1}, {"kept": 1.1}]
)
def test_schedules_out_of_range(wrong):
    with pytest.raises(bmr.errors.FitError, match="Every"):
        bmr.Every(**wrong)


@pytest.mark.parametrize("guide", [bmr.FullRank, bmr.MeanField])
def test_the_history_has_the_gains_of_the_reductions(guide, monkeypatch):
    """With correlations the joint ones, which are not the sums over the marginals."""
    made, reduce = [], bmr.Every.reduce
    monkeypatch.setattr(
        bmr.Every, "reduce", lambda self, *args: made.append(reduce(self, *args)) or made[-1]
    )
    x = torch.cat([X, X + 0.2 * X.flip(0)], 1)[:, [0, 4, 1, 5]]
    every = bmr.Every(epochs=10, start=0.3, stop=0.9)
    fit = bmr.fit(
        program,
        (x, Y),
        guide=guide,
        epochs=30,
        optimizer=bmr.adam(0.1),
        reduce=every,
        progress=False,
    )
    made = made[1:]  # the first is a check that it can be done
    gain = sum(each.delta_f for each in made)
    assert (
        fit.history["delta_f"].iloc[-1] == pytest.approx(gain, rel=1e-6)
        and 0 < fit.history["kept"].iloc[-1] < 1
    )
    marginal = sum(
        float(s.spike_delta_f[each.before["w"].kept & ~s.site.kept].sum())
        for each in made
        for s in each.sites.values()
    )
    assert (abs(marginal - gain) > 0.1) == (guide is bmr.FullRank)
