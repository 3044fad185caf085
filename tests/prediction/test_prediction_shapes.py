"""The predictive of every observed distribution has its rows first, whatever its event and its
plates, and is the mixture of its draws.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_bmr as bmr

N, DRAWS = 6, 5
GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(N, 3, generator=GENERATOR, dtype=torch.float64)
POSTERIOR = bmr.Posterior.from_moments(
    {"w": torch.randn(3, 2, generator=GENERATOR, dtype=torch.float64)},
    {"w": torch.full((3, 2), 0.2, dtype=torch.float64)},
    bmr.Gaussian(1.0),
)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.4]], dtype=torch.float64)
WEIGHTS = torch.randn(2, 4, 5, generator=GENERATOR, dtype=torch.float64)


def rows(fn):
    """The site in a plate of the rows."""

    def observe(h, y):
        with pyro.plate("data", len(h)):
            pyro.sample("y", fn(h), obs=y)

    return observe


def plates(h, y):
    """The rows in the last dimension, beside a plate of outputs."""
    with pyro.plate("outputs", 2, dim=-2), pyro.plate("data", len(h), dim=-1):
        pyro.sample("y", dist.Normal(h.mT, 0.3), obs=None if y is None else y.mT)


def bare(h, y):
    pyro.sample("y", dist.Normal(h[:, 0], 0.3).to_event(1), obs=y)


def counts(h, y):
    with pyro.plate("outputs", 2, dim=-2), pyro.plate("data", len(h), dim=-1):
        pyro.sample("y", dist.Poisson(h.mT.exp()), obs=None if y is None else y.mT)


OBSERVED = {
    "a vector": (rows(lambda h: dist.Normal(h, 0.3).to_event(1)), (2,)),
    "a matrix": (
        rows(lambda h: dist.Normal(h[:, :, None] * torch.ones(4).double(), 0.3).to_event(2)),
        (2, 4),
    ),
    "one number": (rows(lambda h: dist.Normal(h[:, 0], h[:, 1].exp())), ()),
    "a plate of outputs": (plates, (2,)),
    "no plate": (bare, ()),
    "multivariate normal": (rows(lambda h: dist.MultivariateNormal(h, COV)), (2,)),
    "Poisson": (rows(lambda h: dist.Poisson(h[:, 0].exp())), ()),
    "Poisson in a plate of outputs": (counts, (2,)),
    "Bernoulli": (rows(lambda h: dist.Bernoulli(logits=h).to_event(1)), (2,)),
    "Student-t": (rows(lambda h: dist.StudentT(5.0, h[:, 0], 0.3)), ()),
    "log-normal": (rows(lambda h: dist.LogNormal(h[:, 0], 0.3)), ()),
    "masked": (
        rows(lambda h: dist.Exponential(h[:, 0].exp()).mask(torch.ones(len(h), dtype=torch.bool))),
        (),
    ),
}


def program_of(observe):
    def program(x, y=None):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3, 2), 1.0).to_event(2))
        observe(x @ w, y)

    return program


def mixture(program, y):
    """log p(y | x, data) and the mean of each row, from the program's own log densities at the
    draws, one row and one draw at a time.
    """
    generator = torch.Generator().manual_seed(7)
    logs, means = [], []
    for values in POSTERIOR.draws(DRAWS, generator):
        conditioned = pyro.poutine.condition(program, data=values)
        per_row = []
        for k in range(N):
            node = pyro.poutine.trace(conditioned).get_trace(X[k : k + 1], y[k : k + 1]).nodes["y"]
            per_row.append(node["fn"].log_prob(node["value"]).sum())
        logs.append(torch.stack(per_row))
        node = pyro.poutine.trace(conditioned).get_trace(X).nodes["y"]
        means.append(
            node["fn"].mean.mT
            if node["cond_indep_stack"] and len(node["cond_indep_stack"]) == 2
            else node["fn"].mean
        )
    return torch.stack(logs).logsumexp(0) - math.log(DRAWS), torch.stack(means)


@pytest.mark.parametrize("name", OBSERVED)
@pytest.mark.parametrize("batch_size", [4, 1000])
def test_every_observed_distribution_has_its_rows_first(name, batch_size):
    observe, event = OBSERVED[name]
    program = program_of(observe)
    y = (
        torch.randint(2, (N, *event), generator=torch.Generator().manual_seed(3)).double()
        if name in ("Poisson", "Bernoulli")
        else None
    )
    y = (
        0.5 + torch.rand(N, *event, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        if y is None
        else y
    )
    y = y.round() if "Poisson" in name else y
    prediction = bmr.predict(program, POSTERIOR, X, draws=DRAWS, seed=7, batch_size=batch_size)
    log_prob, means = mixture(program, y)
    torch.testing.assert_close(prediction.log_prob(y), log_prob)
    torch.testing.assert_close(prediction.mean, means.mean(0))
    torch.testing.assert_close(prediction.epistemic, means.var(0, correction=0))
    assert (
        prediction.aleatoric.shape == prediction.mean.shape == (N, *event)
        and (prediction.aleatoric > 0).all()
    )
    with pytest.raises(
        bmr.errors.DataError, match=r"y: expected shape \(6.*the prediction, got shape \(3,"
    ):
        prediction.log_prob(y[:3])
    assert bmr.predict(program, POSTERIOR, X, draws=0).mean.shape == (N, *event)


@pytest.mark.parametrize("batch_size", [4, 7, 1000])
def test_classes_at_several_positions(batch_size):
    program = program_of(
        rows(lambda h: dist.Categorical(logits=torch.einsum("ni,itc->ntc", h, WEIGHTS)).to_event(1))
    )
    prediction = bmr.predict(program, POSTERIOR, X, draws=DRAWS, seed=7, batch_size=batch_size)
    generator = torch.Generator().manual_seed(7)
    probs = torch.stack(
        [
            torch.einsum("ni,itc->ntc", X @ values["w"], WEIGHTS).softmax(-1)
            for values in POSTERIOR.draws(DRAWS, generator)
        ]
    )
    torch.testing.assert_close(prediction.probs, probs.mean(0))
    torch.testing.assert_close(prediction.aleatoric, -(probs * probs.log()).sum(-1).mean(0))
    y = torch.arange(N * 4).view(N, 4) % 5
    torch.testing.assert_close(
        prediction.log_prob(y), probs.mean(0).gather(-1, y[..., None])[..., 0].log()
    )
    with pytest.raises(
        bmr.errors.DataError, match=r"y: expected shape \(6, 4\), .*got shape \(24,\)"
    ):
        prediction.log_prob(y.flatten())


def coupled(h, y):
    pyro.sample("y", dist.MultivariateNormal(h[:, 0], torch.eye(len(h)).double()), obs=y)


def two_sites(h, y):
    with pyro.plate("data", len(h)):
        pyro.sample("a", dist.Normal(h[:, 0], 0.3), obs=y)
        pyro.sample("b", dist.Poisson(h[:, 1].exp()), obs=y)


def summed(h, y):
    pyro.sample("y", dist.Normal(h.sum(0), 0.3).to_event(1), obs=y)


def square(h, y):
    with pyro.plate("outputs", 6, dim=-2), pyro.plate("data", len(h), dim=-1):
        pyro.sample("y", dist.Normal(h[:, 0], 0.3), obs=y)


REFUSED = {
    "rows that depend on each other": (
        coupled,
        "observed site 'y': its MultivariateNormal is one density for all rows",
    ),
    "two sites": (two_sites, r"one observed site.*got: a \(Normal\), b \(Poisson\)"),
    "a sum over rows": (summed, r"observed site 'y': expected 6 rows, .*got shape \(2,\)"),
    "two plates of that size": (square, "plates 'outputs', 'data' all have 6 entries"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_predictive_of_a_row_is_refused_by_name(name):
    observe, words = REFUSED[name]
    with pytest.raises(bmr.errors.ModelError, match=words):
        bmr.predict(program_of(observe), POSTERIOR, X, draws=2)


@pytest.mark.parametrize(
    "change",
    [
        {"draws": 2.0},
        {"draws": True},
        {"draws": -1},
        {"batch_size": 2.0},
        {"batch_size": 0},
        {"seed": 1.5},
    ],
)
def test_numbers_that_are_no_whole_numbers(change):
    with pytest.raises(bmr.errors.ModelError, match=rf"predict\({next(iter(change))}="):
        bmr.predict(program_of(bare), POSTERIOR, X, **change)


def test_modules_keep_the_mode_they_were_in():
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    ).double()
    program = bmr.BayesianNetwork(net, {"0.*": bmr.Gaussian(1.0), "*": None}, bmr.Categorical())
    program.train()
    net[1].eval()
    y = torch.arange(N) % 2
    posterior = bmr.Posterior.from_guide(bmr.MeanField(program, X, y), program, X, y)
    bmr.predict(program, posterior, X, draws=2)
    assert program.training and net[0].training and not net[1].training
