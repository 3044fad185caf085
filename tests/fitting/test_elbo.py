"""The bound of `MeanField` against Pyro's own ELBO at a fixed draw: value and gradient."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.util import prune_subsample_sites
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.pruning import Masked

X, Y = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
ROWS = bmr.Horseshoe(0.4, None, ("layer", "unit"), parametrization="gamma")
SHARED = [
    bmr.Gaussian("layer", per="unit"),
    bmr.Laplace(),
    bmr.StudentT(3.0, 0.4),
    bmr.SpikeAndSlab(temperature=0.6, per="input"),
]
PRIORS = [
    bmr.Gaussian(0.6, mean=0.2),
    bmr.Gaussian("layer"),
    bmr.Gaussian("empirical"),
    bmr.Horseshoe(),
    ROWS,
    bmr.SpikeAndSlab(),
    *SHARED,
]
# of a Laplace, Pyro takes the KL in closed form
SAMPLED_AS_PYRO = [p for p in PRIORS if not isinstance(p, bmr.Laplace)]


def network(prior):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return bmr.BayesianNetwork(net, prior, bmr.Categorical(size=50))


def hand_written(x, y=None):
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.3, dtype=torch.float64), 0.8))
    with pyro.plate("features", 4):
        w = pyro.sample("w", dist.Normal(torch.tensor(0.4, dtype=torch.float64), scale))
    with pyro.plate("data", 50, subsample=torch.arange(len(x))):
        pyro.sample("y", dist.Normal(x @ w, 0.9), obs=y)


def masks_for(guide, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        s.name: torch.rand(s.shape, generator=generator) < 0.6
        for s in guide.latents
        if s.transform is None
    }


def pyro_loss(program, guide, values, y):
    """Pyro's loss and the guide's gradients, at the draw whose site values are given."""
    wrapped = poutine.condition(guide, data={})

    class Fixed(poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            if msg["name"] in values and not msg["is_observed"]:
                msg["value"], msg["done"] = values[msg["name"]], True

    guide_trace = poutine.trace(Fixed()(wrapped)).get_trace(X, y)
    model_trace = poutine.trace(poutine.replay(program, guide_trace)).get_trace(X, y)
    model_trace, guide_trace = (
        prune_subsample_sites(model_trace),
        prune_subsample_sites(guide_trace),
    )
    for trace in (model_trace, guide_trace):
        trace.compute_log_prob()
    guide_trace.compute_score_parts()
    return TraceMeanField_ELBO()._differentiable_loss_particle(model_trace, guide_trace)[1]


def site_values(guide, noise):
    z = guide.views(guide.loc + guide.log_scale.exp() * noise)
    return {
        s.name: z[s.name] if s.transform is None else s.transform(z[s.name]) for s in guide.latents
    }


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(
    "prior", [*SAMPLED_AS_PYRO, None], ids=[*(repr(p)[:44] for p in SAMPLED_AS_PYRO), "by hand"]
)
def test_value_and_gradient_are_pyros(prior, masked):
    program, y = (hand_written, X[:, 1]) if prior is None else (network(prior), Y)
    guide = bmr.MeanField(program, X, y)
    with torch.no_grad():
        guide.loc += 0.3 * torch.randn_like(guide.loc)
        guide.log_scale += 0.2 * torch.randn_like(guide.loc)
    noise = torch.randn_like(guide.loc)
    masks = masks_for(guide) if masked else {}
    terms = bmr.fitting.elbo_terms(program, guide, X, y, masks=masks, noise=noise)
    fast = terms.kl - terms.expected_log_likelihood
    grads = torch.autograd.grad(fast, list(guide.parameters()))
    slow = pyro_loss(Masked(masks)(program), Masked(masks)(guide), site_values(guide, noise), y)
    expected = torch.autograd.grad(slow, list(guide.parameters()))
    assert fast.item() == pytest.approx(slow.item(), rel=1e-10)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_gradients_by_finite_differences():
    """Through a hyper-prior, so that the gradient of the prior's scale counts."""
    program = network(bmr.Gaussian("layer"))
    guide = bmr.MeanField(program, X, Y)
    noise, masks = torch.randn_like(guide.loc), masks_for(guide)

    def loss(loc, log_scale):
        guide.loc.data, guide.log_scale.data = loc, log_scale
        terms = bmr.fitting.elbo_terms(program, guide, X, Y, masks=masks, noise=noise)
        return terms.kl - terms.expected_log_likelihood

    loc, log_scale = guide.loc.detach().clone(), guide.log_scale.detach().clone()
    grads = torch.autograd.grad(loss(loc, log_scale), [guide.loc, guide.log_scale])
    for which, grad in enumerate(grads):
        for k in range(0, loc.numel(), 7):
            step = torch.zeros_like(loc)
            step[k] = 1e-6
            up, down = (
                [loc + s, log_scale] if which == 0 else [loc, log_scale + s] for s in (step, -step)
            )
            assert (loss(*up) - loss(*down)).item() / 2e-6 == pytest.approx(
                grad[k].item(), rel=1e-4, abs=1e-5
            )


@pytest.mark.slow
@pytest.mark.parametrize("draws", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_autonormal_goes_through_pyro_and_agrees_in_the_mean(draws):
    """The same moments in AutoNormal and MeanField: equal ELBO within 4 standard errors."""
    from pyro.infer.autoguide import AutoNormal

    program = network(bmr.Gaussian(0.6))
    fast = bmr.MeanField(program, X, Y)
    auto = AutoNormal(program)
    auto(X, Y)
    scales = fast.views(fast.log_scale.detach().exp())
    for name, value in fast.views(fast.loc.detach()).items():
        layer, part = name.split(".")
        setattr(getattr(auto.locs, layer), part, pyro.nn.PyroParam(value.clone()))
        setattr(
            getattr(auto.scales, layer),
            part,
            pyro.nn.PyroParam(scales[name].clone(), dist.constraints.positive),
        )
    pyro.clear_param_store()
    with torch.no_grad():
        totals = [
            torch.stack(
                [
                    t.expected_log_likelihood - t.kl
                    for t in (bmr.fitting.elbo_terms(program, g, X, Y) for _ in range(draws))
                ]
            )
            for g in (fast, auto)
        ]
    error = sum(float(t.var() / len(t)) for t in totals) ** 0.5
    assert abs(float(totals[0].mean() - totals[1].mean())) < 4 * error


def test_priors_with_an_event_dimension():
    """The density of a joint prior counts once."""
    cov = torch.tensor([[1.3, 0.4], [0.4, 0.8]], dtype=torch.float64)

    def joint(x, y=None):
        w = pyro.sample(
            "w", dist.MultivariateNormal(torch.tensor([0.2, -0.1], dtype=torch.float64), cov)
        )
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, :2] @ w, 0.9), obs=y)

    guide = bmr.MeanField(joint, X, X[:, 1])
    noise = torch.tensor([0.3, -1.1], dtype=torch.float64)
    w = guide.loc + guide.log_scale.exp() * noise
    log_q = dist.Normal(guide.loc, guide.log_scale.exp()).log_prob(w).sum()
    expected = log_q - dist.MultivariateNormal(
        torch.tensor([0.2, -0.1], dtype=torch.float64), cov
    ).log_prob(w)
    assert bmr.fitting.elbo_terms(joint, guide, X, X[:, 1], noise=noise).kl.item() == pytest.approx(
        expected.item(), rel=1e-10
    )
    with pytest.raises(bmr.errors.ModelError, match="site 'w'.*does not split"):
        bmr.fitting.elbo_terms(joint, guide, X, X[:, 1], masks={"w": torch.tensor([True, False])})


def test_a_masked_program_has_the_kl_of_its_living_entries():
    program = network(bmr.Gaussian(0.6))
    guide = bmr.MeanField(program, X, Y)
    masks, noise = masks_for(guide), torch.randn_like(guide.loc)
    inside = bmr.fitting.elbo_terms(
        Masked(masks)(program), bmr.MeanField(Masked(masks)(program), X, Y), X, Y, noise=noise
    )
    outside = bmr.fitting.elbo_terms(program, guide, X, Y, noise=noise, masks=masks)
    assert inside.kl.item() == pytest.approx(outside.kl.item(), rel=1e-10)
    assert inside.expected_log_likelihood.item() == pytest.approx(
        outside.expected_log_likelihood.item(), rel=1e-10
    )


def test_a_site_that_the_guide_has_not_is_no_likelihood():
    guide = bmr.MeanField(hand_written, X, X[:, 1])

    def larger(x, y=None):
        pyro.sample("extra", dist.Normal(torch.tensor(0.0), 1.0))
        hand_written(x, y)

    with pytest.raises(
        bmr.errors.ModelError, match="site 'extra' of the program is not in the guide"
    ):
        bmr.fitting.elbo_terms(larger, guide, X, X[:, 1])
