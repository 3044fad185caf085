"""The log densities of the likelihoods, at values that are not neutral, against SciPy and torch."""

import math
import warnings

import pyro
import pytest
import torch
from pyro.distributions.util import scale_and_mask
from scipy import stats
from torch import nn
from torch.nn.functional import cross_entropy

import pyro_bmr as bmr
from pyro_bmr import likelihoods
from pyro_bmr.likelihoods.ordinal import cut_points, log_probs
from pyro_bmr.tracing import Values

N = 6
GENERATOR = torch.Generator().manual_seed(5)
NAN = math.nan


def randn(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


F1, F3, F6 = 1.3 * randn(N) + 0.4, 1.3 * randn(N, 3) + 0.4, 0.7 * randn(N, 6)
REAL1, REAL3 = 1.7 * randn(N) - 0.6, 1.7 * randn(N, 3) - 0.6
COUNT1, COUNT3 = (randn(*shape).abs().mul(4).floor() for shape in ((N,), (N, 3)))
BIT1, BIT3 = (randn(*shape).gt(0.1).double() for shape in ((N,), (N, 3)))
EXPOSURE = randn(N).abs() + 0.3


def site_log_prob(likelihood, output, y, values, **read):
    """Σ log p of the observed site, with the scale of its plate."""
    with Values({k: torch.as_tensor(v, dtype=torch.float64) for k, v in values.items()}) as run:
        likelihood.observe(output, y, **read)
    assert set(run.latent) == set(getattr(likelihood, "inferred", ())) == set(values)
    msg = run.observed["y"]
    return scale_and_mask(msg["fn"].log_prob(msg["value"]), msg["scale"], msg["mask"]).sum()


def negative_binomial(y, mean, c):
    return stats.nbinom.logpmf(y, c, c / (c + mean))


CASES = {
    "normal": (
        bmr.Normal(),
        (F1[:, None], REAL1, {"noise": 0.7}),
        stats.norm.logpdf(REAL1, F1, 0.7),
    ),
    "normal, noise of each output": (
        bmr.Normal(noise="per output"),
        (F3, REAL3, {"noise": [0.4, 0.9, 2.1]}),
        stats.norm.logpdf(REAL3, F3, [0.4, 0.9, 2.1]),
    ),
    "normal, fixed noise": (
        bmr.Normal(noise=0.3),
        (F3, REAL3, {}),
        stats.norm.logpdf(REAL3, F3, 0.3),
    ),
    "normal, noise of the network": (
        bmr.Normal(noise="network"),
        (F6, REAL3, {}),
        stats.norm.logpdf(REAL3, F6[:, :3], F6[:, 3:].exp()),
    ),
    "normal, noise of the network, one output": (
        bmr.Normal(noise="network"),
        (F6[:, :2], REAL1, {}),
        stats.norm.logpdf(REAL1, F6[:, 0], F6[:, 1].exp()),
    ),
    "Student": (
        likelihoods.StudentT(),
        (F1, REAL1, {"noise": 0.6, "df": 3.4}),
        stats.t.logpdf(REAL1, 3.4, F1, 0.6),
    ),
    "Student, fixed": (
        likelihoods.StudentT(2.5, noise=0.8),
        (F3, REAL3, {}),
        stats.t.logpdf(REAL3, 2.5, F3, 0.8),
    ),
    "Bernoulli": (
        bmr.Bernoulli(),
        (F1[:, None], BIT1, {}),
        stats.bernoulli.logpmf(BIT1, 1 / (1 + (-F1).exp())),
    ),
    "many labels": (
        bmr.Bernoulli(),
        (F3, BIT3, {}),
        stats.bernoulli.logpmf(BIT3, 1 / (1 + (-F3).exp())),
    ),
    "Poisson": (bmr.Poisson(), (F3, COUNT3, {}), stats.poisson.logpmf(COUNT3, F3.exp())),
    "Poisson with exposure": (
        bmr.Poisson(exposure=0),
        (F1[:, None], COUNT1, {}, EXPOSURE),
        stats.poisson.logpmf(COUNT1, EXPOSURE * F1.exp()),
    ),
    "negative binomial": (
        bmr.NegativeBinomial(),
        (F3, COUNT3, {"concentration": 2.7}, EXPOSURE),
        negative_binomial(COUNT3, EXPOSURE[:, None] * F3.exp(), 2.7),
    ),
    "negative binomial, fixed": (
        bmr.NegativeBinomial(0.6),
        (F1, COUNT1, {}),
        negative_binomial(COUNT1, F1.exp(), 0.6),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_density_is_that_of_scipy(case):
    likelihood, (output, y, values, *exposure), expected = CASES[case]
    read = {"exposure": exposure[0]} if exposure else {}
    expected = float(torch.as_tensor(expected).sum())
    got = site_log_prob(likelihood, output, y, values, **read)
    assert float(got) == pytest.approx(expected, rel=1e-10)
    if not values:
        assert float(likelihood.log_prob(output, y, **read)) == pytest.approx(expected, rel=1e-10)
        model = bmr.BayesianNetwork(nn.Linear(2, 1), bmr.Gaussian(1.0), likelihood)
        assert model.has_log_likelihood
    whole = type(likelihood)(**{**vars(likelihood), "size": 4 * N})
    assert float(site_log_prob(whole, output, y, values, **read)) == pytest.approx(4 * expected)


WITH_GAPS = [
    (bmr.Normal(noise=0.3, missing="ignore"), F3, REAL3),
    (likelihoods.StudentT(3, noise=0.3, missing="ignore"), F3, REAL3),
    (bmr.Bernoulli(missing="ignore"), F3, BIT3),
    (bmr.Poisson(missing="ignore"), F3, COUNT3),
    (bmr.NegativeBinomial(1.4, missing="ignore"), F3, COUNT3),
    (bmr.Categorical(ignore_index=-7), F6.view(N, 3, 2), BIT3),
]


@pytest.mark.parametrize(("likelihood", "output", "y"), WITH_GAPS, ids=lambda v: type(v).__name__)
def test_a_missing_target_has_no_density_and_no_gradient(likelihood, output, y):
    known = (torch.arange(3 * N) % 4 != 1).view(N, 3)
    gaps = y.masked_fill(~known, -7 if isinstance(likelihood, bmr.Categorical) else NAN)
    output = output.clone().requires_grad_()
    got = site_log_prob(likelihood, output, gaps, {})
    parts = [
        float(site_log_prob(likelihood, output.detach()[i : i + 1, j], y[i : i + 1, j], {}))
        for i, j in known.nonzero().tolist()
    ]
    assert len(parts) == 13 and float(got.detach()) == pytest.approx(sum(parts), rel=1e-10)
    again = likelihood.log_prob(output.detach(), gaps)
    assert float(again) == pytest.approx(sum(parts), rel=1e-10)
    got.backward()
    of_known = output.grad.reshape(N, 3, -1)[known]
    assert output.grad.isfinite().all() and (of_known != 0).all()
    assert (output.grad.reshape(N, 3, -1)[~known] == 0).all()


LABELS = torch.randint(0, 3, (N, 4), generator=GENERATOR)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignore_index": -100},
        {"weight": (0.5, 2.0, 1.3)},
        {"label_smoothing": 0.2},
        {"weight": (0.5, 2.0, 1.3), "label_smoothing": 0.2, "ignore_index": 2},
    ],
    ids=str,
)
def test_labels_are_scored_as_by_torch(options, axis):
    logits = F6.repeat(1, 2).view(N, 4, 3) * torch.arange(1, 5)[:, None]
    labels = LABELS.clone()
    if options.get("ignore_index", 0) < 0:
        labels[::2, 1:] = -100
    given = {key: torch.tensor(v) if key == "weight" else v for key, v in options.items()}
    if "weight" in given:
        given["weight"] = given["weight"].double()
    expected = -cross_entropy(logits.movedim(-1, 1), labels, reduction="sum", **given)
    likelihood = bmr.Categorical(class_axis=axis, **options)
    output = logits.movedim(-1, axis)
    assert float(site_log_prob(likelihood, output, labels, {})) == pytest.approx(float(expected))
    assert float(likelihood.log_prob(output, labels)) == pytest.approx(float(expected))
    flat, first = logits[:, 0], labels[:, 0]
    expected = -cross_entropy(flat, first, reduction="sum", **given)
    assert float(likelihood.log_prob(flat, first)) == pytest.approx(float(expected))
    assert float(site_log_prob(likelihood, flat, first, {})) == pytest.approx(float(expected))


def test_an_output_whose_axis_of_classes_is_in_doubt_is_refused():
    output, y = randn(2, 5, 5), torch.zeros(2, 5, dtype=torch.long)
    for likelihood in (bmr.Categorical(), bmr.Categorical(label_smoothing=0.1)):
        with pytest.raises(bmr.errors.DataError, match="class_axis=1 or class_axis=-1"):
            likelihood.observe(output, y)
    own = [float(bmr.Categorical(class_axis=axis).log_prob(output, y)) for axis in (1, -1)]
    assert own[0] == pytest.approx(float(-cross_entropy(output, y, reduction="sum")))
    assert abs(own[0] - own[1]) > 0.1
    with pytest.raises(bmr.errors.DataError, match="the shapes fit class_axis=1"):
        bmr.Categorical().observe(randn(2, 3, 5), y)
    with pytest.raises(bmr.errors.DataError, match="a weight for each of the 5 classes.*got 2"):
        bmr.Categorical(class_axis=1, weight=[1, 2]).observe(output, y)


def test_ordinal_classes_are_slices_of_a_logistic():
    lowest, gaps = torch.tensor(0.23, dtype=torch.float64), randn(3).abs() + 0.2
    cuts = cut_points(lowest, gaps)
    assert cuts.tolist() == pytest.approx(
        [math.log(0.23 / 0.77) + float(gaps[:k].sum()) for k in range(4)]
    )
    y = torch.tensor([0, 1, 2, 3, 4, 2])
    edges = torch.cat([torch.tensor([-math.inf]), cuts, torch.tensor([math.inf])])
    expected = [
        math.log(stats.logistic.cdf(edges[k + 1] - f) - stats.logistic.cdf(edges[k] - f))
        for f, k in zip(F1.tolist(), y.tolist(), strict=True)
    ]
    got = site_log_prob(bmr.Ordinal(5), F1[:, None], y, {"lowest_class": 0.23, "gaps": gaps})
    assert float(got) == pytest.approx(sum(expected), rel=1e-10)
    ignoring = bmr.Ordinal(5, ignore_index=-7)
    values = {"lowest_class": 0.23, "gaps": gaps}
    some = y.clone()
    some[[1, 4]] = -7
    got = site_log_prob(ignoring, F1[:, None], some, values)
    assert float(got) == pytest.approx(sum(expected) - expected[1] - expected[4], rel=1e-10)
    assert likelihoods.Weighted(ignoring, weights=0).ignore_index == -7
    far = log_probs(torch.tensor([60.0]).double(), cuts)  # both cdfs are 0 or 1 in double precision
    assert float(far[0, 0]) == pytest.approx(float(cuts[0]) - 60, rel=1e-12)
    assert float(far.logsumexp(-1)) == pytest.approx(0.0, abs=1e-12)


def test_the_likelihood_takes_its_columns_out_of_x():
    net, e, w = nn.Linear(2, 1).double(), EXPOSURE, 0.5 + randn(N).abs()
    x, y, gaussian = randn(N, 2), COUNT1, bmr.Gaussian(1.0)
    weighted = likelihoods.Weighted(bmr.Poisson(exposure=0), weights=-1)
    model = bmr.BayesianNetwork(net, gaussian, weighted)
    slopes = torch.tensor([[0.7, -1.1]], dtype=torch.float64)
    values = {"weight": slopes, "bias": torch.tensor([0.3], dtype=torch.float64)}
    with Values(values) as run:
        model(torch.cat([e[:, None], x, w[:, None]], 1), y)
    msg = run.observed["y"]
    rate = e * (x @ values["weight"][0] + 0.3).exp()
    expected = float((w * torch.as_tensor(stats.poisson.logpmf(y, rate))).sum())
    got = (msg["fn"].log_prob(msg["value"]) * msg["scale"]).sum()
    assert float(got) == pytest.approx(expected, rel=1e-10)
    assert all(float(run.latent[name]["scale"]) == 1 for name in values)
    named = likelihoods.likelihood.read_inputs(
        likelihoods.Weighted(bmr.Poisson(exposure="time"), weights="w"),
        {"input": x, "time": e, "w": w},
    )
    assert named[0].keys() == {"input"} and named[1] == {"exposure": e, "weights": w}
    with pytest.raises(bmr.errors.DataError, match=r"exposure=7: expected the column.*\(6, 2\)"):
        bmr.BayesianNetwork(net, gaussian, bmr.Poisson(exposure=7))(x, y)
    alone = bmr.BayesianNetwork(net, gaussian, bmr.Poisson(exposure=1))
    assert alone.has_log_likelihood and not model.has_log_likelihood
    given = torch.cat([x[:, :1], e[:, None], x[:, 1:]], 1)
    of_batch = alone.log_likelihood(values, given, y)
    assert float(of_batch) == pytest.approx(float(stats.poisson.logpmf(y, rate).sum()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bmr.Normal(noise=-1.0), r"Normal\(noise=-1.0\).*'per output'"),
        (lambda: bmr.Normal(noise="mine"), "expected a finite number > 0 or 'learned'"),
        (lambda: bmr.Normal(noise_scale=2.0, noise=0.1), "goes with a learned noise alone"),
        (lambda: bmr.Normal(missing="drop"), "expected 'refuse' or 'ignore'"),
        (lambda: likelihoods.StudentT(df=0), r"StudentT\(df=0\)"),
        (lambda: bmr.NegativeBinomial("fixed"), "NegativeBinomial.*or 'learned'"),
        (lambda: bmr.Categorical(label_smoothing=1.0), "label_smoothing=1.0"),
        (lambda: bmr.Categorical(weight=[1.0, 0.0]), "> 0 for each class"),
        (lambda: bmr.Categorical(class_axis=2), "class_axis=2"),
        (lambda: bmr.Ordinal(2), "a whole number >= 3"),
        (lambda: bmr.Ordinal(3, ignore_index=0.5), "ignore_index=0.5"),
        (lambda: likelihoods.Weighted(bmr.Normal, 0).observe(F1, F1, weights=F3), "weights"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(bmr.PyroBMRError, match=message):
        make()


@pytest.mark.parametrize(("loc", "scale"), [(1000.0, 200.0), (0.0, 1e-3), (-3e6, 5e4)])
def test_the_noise_starts_at_the_spread_of_the_target(loc, scale):
    y = loc + scale * torch.linspace(-1.5, 1.5, 8, dtype=torch.float64)
    x = torch.zeros(8, 2, dtype=torch.float64)
    model = bmr.BayesianNetwork(nn.Linear(2, 1).double(), bmr.Gaussian(1.0), bmr.Normal())
    assert not model.has_log_likelihood
    with pytest.warns(bmr.PyroBMRWarning, match="in its first 8 rows.*standardise y"):
        start = {latent.name: latent.start for latent in bmr.MeanField(model, x, y).latents}
    spread = max(float(y.std(correction=0)), 0.1 * float(y.square().mean().sqrt()))
    assert float(start["noise"]) == pytest.approx(math.log(spread), rel=1e-10)
    each = bmr.BayesianNetwork(
        nn.Linear(2, 2).double(), bmr.Gaussian(1.0), bmr.Normal(noise="per output")
    )
    both = torch.stack([y / scale, 0 * y], 1) if abs(loc) < 1 else torch.stack([y, 0 * y], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if abs(loc) < 1 else "ignore")
        latents = bmr.MeanField(each, x, both).latents
    spread = spread / scale if abs(loc) < 1 else spread
    start = next(latent.start for latent in latents if latent.name == "noise")
    assert start.tolist() == pytest.approx([math.log(spread), 0.0], abs=1e-10)


def test_targets_outside_their_support_are_refused_in_every_shape():
    x = torch.randn(9, 2)
    labels = torch.arange(9) % 3
    for likelihood, outputs, y, message in (
        (bmr.Bernoulli(), 1, torch.full((9,), 2), "got 2 in row 0"),
        (bmr.Poisson(), 2, torch.full((9, 2), -1.0), "got -1.0 in row 0"),
        (bmr.Categorical(), 3, labels + 1, "got 3 in row 2; number the classes from 0"),
        (bmr.Categorical(ignore_index=2), 2, labels.where(labels != 0, -2), "got -2 in row 0"),
    ):
        model = bmr.BayesianNetwork(nn.Linear(2, outputs), bmr.Gaussian(1.0), likelihood)
        with pytest.raises(bmr.errors.DataError, match=message):
            bmr.fit(model, (x, y), epochs=1, progress=False)
    y = torch.tensor([1.0, NAN] * 4 + [0.0])
    model = bmr.BayesianNetwork(nn.Linear(2, 1), bmr.Gaussian(1.0), bmr.Bernoulli())
    with pytest.raises(bmr.errors.DataError, match="NaN.*first in row 1.*missing='ignore'"):
        bmr.fit(model, (x, y), epochs=1, progress=False)
    pyro.clear_param_store()
