"""The guides with a Gaussian per site: on the conjugate model against its exact posterior and
evidence, and each structure against torch's dense Gaussian.
"""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy import stats
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.guides import SiteWise
from pyro_bmr.guides.latent_sites import latent_sites
from pyro_bmr.guides.site_normal import entropy, gaussian_kl, log_density
from pyro_bmr.pruning import Masked
from tests.exact import LinearGaussian, linear_gaussian
from tests.parameters import others_slow

ROWS, COLUMNS, NOISE = 2, 2, 0.7
SIZE = ROWS * COLUMNS
PRIOR_MEAN = np.array([0.4, -0.3, 0.2, 0.0])
PRIOR_SCALE = np.array([1.3, 0.8, 1.9, 0.6])
MODEL = linear_gaussian(seed=5, n=25, d=SIZE, noise=NOISE)
X, Y = torch.tensor(MODEL.x), torch.tensor(MODEL.y)
GUIDES = {
    "MeanField": bmr.MeanField,
    "FullRank": bmr.FullRank,
    "LowRankPlusDiagonal": partial(bmr.LowRankPlusDiagonal, rank=SIZE),
    "MatrixVariate": bmr.MatrixVariate,
}
COLUMN_MASK = torch.tensor([[True, False]] * ROWS)


def program(x, y=None):
    loc, scale = (torch.tensor(v).view(ROWS, COLUMNS) for v in (PRIOR_MEAN, PRIOR_SCALE))
    w = pyro.sample("w", dist.Normal(loc, scale).to_event(2))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w.flatten(), NOISE), obs=y)


def bound(guide, masks):
    """The ELBO without sampling noise: E over ±√m eᵢ is E over N(0, I) for a quadratic."""
    size = (
        guide.loc.numel()
        if isinstance(guide, bmr.MeanField)
        else guide.conditional("w", {}, None).noise_size
    )
    points = size**0.5 * torch.cat([torch.eye(size), -torch.eye(size)]).double()
    terms = [
        bmr.fitting.elbo_terms(program, guide, X, Y, masks=masks, noise=point) for point in points
    ]
    return sum(t.expected_log_likelihood for t in terms) / len(terms) - terms[0].kl


def optimum(name, precision):
    """The covariance of the best q against N(μ, P⁻¹), which has mean μ: diagonal 1/Pᵢᵢ; for R ⊗ C
    the fixed point of its stationarity conditions.
    """
    if name == "MeanField":
        return np.diag(1 / np.diag(precision))
    if name != "MatrixVariate":
        return np.linalg.inv(precision)
    m = len(precision) // ROWS
    blocks = precision.reshape(ROWS, m, ROWS, m)
    row, column = np.eye(ROWS), np.eye(m)
    for _ in range(500):
        row = m * np.linalg.inv(np.einsum("jl,ijkl->ik", column, blocks))
        column = ROWS * np.linalg.inv(np.einsum("ik,ijkl->jl", row, blocks))
    return np.kron(row, column)


@pytest.mark.parametrize(
    "name, masked",
    others_slow(
        [*((name, False) for name in GUIDES), ("FullRank", True), ("MatrixVariate", True)],
        *(("MeanField", False), ("FullRank", True), ("MatrixVariate", True)),
    ),
)
def test_conjugate_model(name, masked):
    """Mean, covariance and bound at the optimum: exact posterior and log evidence where the
    structure has them, else its known optimum.
    """
    masks = {"w": COLUMN_MASK} if masked else {}
    kept = masks.get("w", torch.ones(ROWS, COLUMNS, dtype=torch.bool)).flatten().numpy()
    model = LinearGaussian(MODEL.x[:, kept], MODEL.y, NOISE)
    prior = PRIOR_MEAN[kept], np.diag(PRIOR_SCALE[kept] ** 2)
    mean, cov = model.posterior(*prior)
    best = optimum(name, np.linalg.inv(cov))
    gap = 0.5 * (
        np.trace(np.linalg.solve(cov, best))
        - len(cov)
        - np.linalg.slogdet(np.linalg.solve(cov, best))[1]
    )

    guide = GUIDES[name](program, X, Y)
    optimizer = torch.optim.LBFGS(
        guide.parameters(),
        max_iter=60,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def loss():
        optimizer.zero_grad()
        value = -bound(guide, masks)
        value.backward()
        return value

    optimizer.step(loss)
    site = bmr.Posterior.from_guide(guide, program, X, Y, masks=masks)["w"]
    assert float(-loss().detach()) == pytest.approx(model.log_evidence(*prior) - gap, abs=1e-5)
    np.testing.assert_allclose(site.mean.flatten()[kept], mean, atol=1e-4)
    np.testing.assert_allclose(site.var.flatten()[kept], np.diag(best), rtol=1e-3)
    assert not site.mean.flatten()[~kept].any() and not site.var.flatten()[~kept].any()
    if name != "MeanField":
        np.testing.assert_allclose(
            dense(site.joint)[np.ix_(kept, kept)], best, atol=1e-3 * best.max()
        )
        assert gap < 1e-12 or name == "MatrixVariate"


def dense(joint):
    if isinstance(joint, bmr.formulas.Dense):
        return joint.cov.numpy()
    if isinstance(joint, bmr.formulas.LowRank):
        return (joint.var.diag() + joint.factor @ joint.factor.mT).numpy()
    return np.kron(joint.row_cov.numpy(), joint.col_cov.numpy())


def random_guide(name, seed=2):
    guide = {**GUIDES, "LowRankPlusDiagonal": partial(bmr.LowRankPlusDiagonal, rank=2)}[name](
        program, X, Y
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += (
                0.6 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) + 0.5
            )
    return guide


@pytest.mark.parametrize(
    "mask",
    [None, COLUMN_MASK, torch.tensor([[True, False], [True, True]])],
    ids=["whole", "column", "entries"],
)
@pytest.mark.parametrize("name", GUIDES)
@torch.no_grad()
def test_every_structure_is_the_dense_gaussian_of_its_draws(name, mask):
    """Σ = AAᵀ with A read off draws of unit noise: marginals, determinant, entropy, density and KL
    against torch's own.
    """
    guide = random_guide(name)
    q = (guide.conditionals() if isinstance(guide, bmr.MeanField) else guide.conditional)(
        "w", {}, mask
    )
    kept = (torch.ones(ROWS, COLUMNS, dtype=torch.bool) if mask is None else mask).flatten()
    root = torch.stack(
        [
            (q.draw(e) - q.draw(torch.zeros_like(e))).flatten()
            for e in torch.eye(q.noise_size, dtype=torch.float64)
        ],
        1,
    ).detach()
    cov = root @ root.mT
    exact = torch.distributions.MultivariateNormal(q.mean.flatten()[kept], cov[kept][:, kept])
    torch.testing.assert_close(q.var.flatten(), cov.diagonal())
    assert not cov[~kept].any() and not q.mean.flatten()[~kept].any()
    assert float(q.log_det) == pytest.approx(float(torch.logdet(cov[kept][:, kept])), rel=1e-9)
    assert float(entropy(q)) == pytest.approx(float(exact.entropy()), rel=1e-9)
    noise = torch.randn(q.noise_size, dtype=torch.float64)
    z = q.draw(noise)
    assert float(log_density(q, z, noise)) == pytest.approx(
        float(exact.log_prob(z.flatten()[kept])), rel=1e-9
    )
    prior = torch.distributions.MultivariateNormal(
        torch.tensor(PRIOR_MEAN)[kept], torch.tensor(PRIOR_SCALE**2)[kept].diag()
    )
    kl = gaussian_kl(
        q,
        torch.tensor(PRIOR_MEAN).view(ROWS, COLUMNS),
        torch.tensor(PRIOR_SCALE).view(ROWS, COLUMNS),
    )
    assert float(kl) == pytest.approx(
        float(torch.distributions.kl_divergence(exact, prior)), rel=1e-9
    )
    joint = q.joint()
    if joint is not None:
        np.testing.assert_allclose(dense(joint), cov, atol=1e-9)
    else:
        assert name == "MeanField" or (
            name == "MatrixVariate" and mask is not None and mask is not COLUMN_MASK
        )


def scales_and_weights(x, y=None):
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(0.3, dtype=torch.float64)))
    rate = pyro.sample(
        "rate", dist.LogNormal(torch.tensor(0.2, dtype=torch.float64), 0.4).expand([2]).to_event(1)
    )
    with pyro.plate("features", x.shape[1]):
        w = pyro.sample("w", dist.Normal(torch.tensor(0.7, dtype=torch.float64), tau))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w * rate.sum(), 1.0), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FullRank", "LowRankPlusDiagonal"])
def test_pyros_own_elbo_has_the_same_value_at_the_same_draws(name):
    """Positive sites, plates and masks under SVI's Trace_ELBO, against `elbo_terms`; 4 standard
    errors.
    """
    guide = (bmr.FullRank if name == "FullRank" else partial(bmr.LowRankPlusDiagonal, rank=2))(
        scales_and_weights, X, Y
    )
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    masks = {"w": torch.tensor([True, False, True, True])}
    with torch.no_grad():
        ours = torch.stack(
            [
                t.expected_log_likelihood - t.kl
                for t in (
                    bmr.fitting.elbo_terms(scales_and_weights, guide, X, Y, masks=masks)
                    for _ in range(70)
                )
            ]
        )
        svi = SVI(
            Masked(masks)(scales_and_weights),
            Masked(masks)(guide),
            pyro.optim.Adam({"lr": 0.0}),
            Trace_ELBO(),
        )
        pyros = -torch.tensor([svi.evaluate_loss(X, Y) for _ in range(70)])
    error = float(ours.var() / 70 + pyros.var() / 70) ** 0.5
    assert abs(float(ours.mean() - pyros.mean())) < 4 * error < 0.2 * abs(float(ours.mean()))
    values = Masked(masks)(guide)(X, Y)
    assert (
        not values["w"][~masks["w"]].any() and values["w"][masks["w"]].all() and values["tau"] > 0
    )


def test_the_table_says_what_is_sampled():
    table = bmr.FullRank(scales_and_weights, X, Y).table().set_index("site")
    assert table["kl"].to_dict() == {"tau": "sampled", "rate": "closed form", "w": "closed form"}
    assert (
        table["structure"].to_dict() == {"tau": "independent", "rate": "full", "w": "full"}
        and table["size"]["w"] == 4
    )
    assert bmr.MeanField(scales_and_weights, X, Y).table()["structure"].unique().tolist() == [
        "independent"
    ]
    constant = pyro.poutine.condition(
        scales_and_weights, data={"tau": torch.tensor(0.9, dtype=torch.float64)}
    )
    kls = [
        float(bmr.fitting.elbo_terms(constant, bmr.FullRank(constant, X, Y), X, Y).kl.detach())
        for _ in range(3)
    ]
    # what is said to be in closed form has no noise
    assert max(kls) == pytest.approx(min(kls), abs=1e-12)


def test_a_sampled_kl_is_the_integral_in_expectation():
    """log q − log p of a log-normal under a Gamma prior, both expectations by Gauss–Hermite nodes
    in place of the noise.
    """

    def rate(x, y=None):
        value = pyro.sample(
            "rate",
            dist.Gamma(
                torch.tensor(2.2, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)
            ),
        )
        pyro.sample("y", dist.Poisson(value), obs=torch.tensor(3.0, dtype=torch.float64))

    guide = bmr.FullRank(rate, X, Y, init_scale=0.3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    with torch.no_grad():
        got = sum(
            w * float(bmr.fitting.elbo_terms(rate, guide, X, Y, noise=torch.tensor([e])).kl)
            for e, w in zip(nodes, weights, strict=True)
        )
        q = guide.conditional("rate", {}, None)
    mean, std = q.mean.item(), q.var.sqrt().item()
    values = np.exp(mean + std * nodes)
    exact = weights @ (
        stats.lognorm(std, scale=np.exp(mean)).logpdf(values)
        - stats.gamma(2.2, scale=1 / 1.3).logpdf(values)
    )
    assert got == pytest.approx(exact, rel=1e-9)


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    return bmr.BayesianNetwork(net, bmr.Gaussian(0.7), bmr.Normal())


@pytest.mark.parametrize(
    "guide", [bmr.FullRank, bmr.LowRankPlusDiagonal, bmr.MatrixVariate, bmr.ScaleCoupled]
)
def test_networks_start_at_their_weights_with_small_deviations_and_the_random_state_stays(guide):
    model, before = network(), torch.random.get_rng_state()
    q = guide(model, X, Y)
    assert torch.equal(before, torch.random.get_rng_state())
    sites = q.at_point({})
    starts = {latent.name: latent.start for latent in latent_sites(model, X, Y)}
    for name, site in sites.items():
        torch.testing.assert_close(site.mean, starts[name])
        assert site.mean.dtype == site.var.dtype == torch.float64
    rms = starts["0.weight"].square().mean().sqrt()
    assert ((sites["0.weight"].var.sqrt() / (0.3 * rms) - 1).abs() < 0.3).all()


@pytest.mark.parametrize(
    "guide",
    [
        partial(bmr.FullRank, sites="0.*"),
        partial(bmr.LowRankPlusDiagonal, rank=2),
        bmr.MatrixVariate,
        bmr.ScaleCoupled,
    ],
)
def test_fit_with_reductions_takes_every_guide(guide):
    fit = bmr.fit(
        network(),
        (X, Y),
        guide=guide,
        epochs=6,
        batch_size=13,
        progress=False,
        reduce=bmr.Every(to=bmr.Gaussian(0.0), start=0.3),
    )
    assert isinstance(fit.guide, SiteWise) and 0 < fit.history["kept"].iloc[-1] <= 1
    dead = ~fit.masks["0.weight"]
    assert (
        not fit.posterior["0.weight"].var[dead].any()
        and not fit.posterior.draw()["0.weight"][dead].any()
    )
    assert bmr.predict(fit.program, fit.posterior, X, draws=3).mean.isfinite().all()


def test_a_site_that_is_too_large_names_its_memory_and_the_alternative():
    def wide(x, y=None):
        pyro.sample("w", dist.Normal(torch.zeros(30, 200), 1.0).to_event(2))
        pyro.sample("y", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1), obs=y)

    with pytest.raises(
        bmr.errors.ModelError,
        match=r"site 'w'.*6000 entries takes 0.576 GB.*LowRankPlusDiagonal or MatrixVariate",
    ):
        bmr.FullRank(wide, X, Y)
    with pytest.raises(
        bmr.errors.ModelError, match=r"site 'w'.*200 columns takes 0.00064 GB.*LowRankPlusDiagonal"
    ):
        bmr.MatrixVariate(wide, X, Y, limit=100)
    with pytest.raises(bmr.errors.ModelError, match="sites='v' matches no site; the sites are: w"):
        bmr.FullRank(wide, X, Y, sites="v")
    with pytest.raises(bmr.errors.ModelError, match="rank=0"):
        bmr.LowRankPlusDiagonal(wide, X, Y, rank=0)
    assert bmr.MatrixVariate(wide, X, Y).table()["parameters"].item() == 6000 + 30 * 31 + 200 * 201


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FullRank", "LowRankPlusDiagonal", "MatrixVariate"])
def test_a_posterior_draws_saves_and_loads_its_covariance(name, tmp_path):
    posterior = bmr.Posterior.from_guide(random_guide(name), program, X, Y)
    posterior.save(tmp_path / "p.safetensors")
    loaded = bmr.Posterior.load(tmp_path / "p.safetensors")
    assert type(loaded["w"].joint) is type(posterior["w"].joint)
    np.testing.assert_array_equal(dense(loaded["w"].joint), dense(posterior["w"].joint))
    masked = loaded.masked({"w": COLUMN_MASK})
    kept = COLUMN_MASK.flatten().numpy()
    cov = dense(posterior["w"].joint) * kept[:, None] * kept
    np.testing.assert_allclose(dense(masked["w"].joint), cov, atol=1e-12)
    np.testing.assert_allclose(masked["w"].var.flatten(), np.diag(cov), rtol=1e-9)
    generator = torch.Generator().manual_seed(4)
    for drawn, covariance in ((loaded, dense(posterior["w"].joint)), (masked, cov)):
        deviation = (
            torch.stack([drawn.draw(generator)["w"].flatten() for _ in range(3000)])
            - drawn["w"].mean.flatten()
        )
        products = torch.einsum("ni,nj->nij", deviation, deviation)
        assert (
            (products.mean(0) - torch.tensor(covariance)).abs()
            <= 5 * products.std(0) / 3000**0.5 + 1e-12
        ).all()
    # single entries of a matrix normal too
    diagonal = torch.tensor([[True, False], [False, True]])
    some = loaded.masked({"w": diagonal})
    pair = torch.stack([some.draw(generator)["w"].flatten() for _ in range(3000)]).mT.cov()
    kept = diagonal.flatten().numpy()
    exact = torch.tensor(dense(posterior["w"].joint) * kept[:, None] * kept)
    size = exact.diagonal().max()
    assert ((pair - exact).abs() <= 5 * size * (2 / 3000) ** 0.5).all() and not pair[1].any()
