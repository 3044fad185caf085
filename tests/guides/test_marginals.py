"""Guides whose sites follow other sites: the marginal moments, against linear algebra by hand, and
what is refused.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import easy_guide
from pyro.infer.autoguide import (
    AutoGaussian,
    AutoHierarchicalNormalMessenger,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    init_to_median,
)

import pyro_bmr as bmr

SLOPE = torch.tensor([[1.5, -0.4], [0.3, 2.0], [-1.1, 0.7]]).double()
OFFSET = torch.tensor([0.6, -1.2, 2.5]).double()
STD_M, STD_W = torch.tensor([0.7, 1.3]).double(), torch.tensor([0.5, 0.2, 0.9]).double()
MEAN_M = torch.tensor([2.7, -0.8]).double()


def program():
    m = pyro.sample("m", dist.Normal(torch.full((2,), 0.2).double(), 3.0).to_event(1))
    pyro.sample("w", dist.Normal(torch.full((3,), -0.3).double() + m.sum(), 1.4).to_event(1))


def draw_m():
    return pyro.sample("m", dist.Normal(MEAN_M, STD_M).to_event(1))


def normal():
    pyro.sample("w", dist.Normal(OFFSET + SLOPE @ draw_m(), STD_W).to_event(1))


def point():
    pyro.sample("w", dist.Delta(OFFSET + SLOPE @ draw_m(), event_dim=1))


def transformed():
    base = dist.Normal(torch.zeros(3).double(), 1.0)
    pyro.sample(
        "w",
        dist.TransformedDistribution(
            base, [dist.transforms.AffineTransform(OFFSET + SLOPE @ draw_m(), STD_W)]
        ).to_event(1),
    )


def multivariate():
    pyro.sample("w", dist.MultivariateNormal(OFFSET + SLOPE @ draw_m(), STD_W.square().diag()))


def auxiliary():
    own = pyro.sample(
        "noise",
        dist.Normal(torch.zeros(3).double(), STD_W).to_event(1),
        infer={"is_auxiliary": True},
    )
    pyro.sample("w", dist.Delta(OFFSET + SLOPE @ draw_m() + own, event_dim=1))


@pytest.mark.parametrize(
    "guide", [normal, transformed, multivariate, auxiliary, point], ids=lambda guide: guide.__name__
)
def test_a_site_that_follows_another_has_its_marginal_moments(guide):
    torch.manual_seed(4)
    first, second = (bmr.Posterior.from_guide(guide, program)["w"] for _ in range(2))
    std_m, own = STD_M.numpy(), 0 if guide is point else np.diag(STD_W.numpy() ** 2)
    cov = SLOPE.numpy() @ np.diag(std_m**2) @ SLOPE.numpy().T + own
    np.testing.assert_allclose(first.mean, OFFSET.numpy() + SLOPE.numpy() @ MEAN_M.numpy())
    np.testing.assert_allclose(first.var, np.diag(cov))
    joint = (
        first.joint.cov
        if isinstance(first.joint, bmr.formulas.Dense)
        else first.joint.var.diag() + first.joint.factor @ first.joint.factor.mT
    )
    np.testing.assert_allclose(joint, cov)
    assert (
        torch.equal(first.mean, second.mean)
        and torch.equal(first.var, second.var)
        and first.given == ("m",)
    )


def test_three_sites_in_a_row_and_a_site_of_one_entry():
    def chain():
        a = pyro.sample("a", dist.LogNormal(torch.tensor(0.3), 0.4))
        b = pyro.sample("b", dist.Normal(1.5 * a.log() - 0.2, 0.5))
        pyro.sample("c", dist.LogNormal(0.7 * b + 0.1 * a.log(), 0.3))

    def of():
        a = pyro.sample("a", dist.LogNormal(torch.tensor(0.0), 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("c", dist.LogNormal(b, 1.0))

    posterior = bmr.Posterior.from_guide(chain, of)
    slope = 0.7 * 1.5 + 0.1  # of log c in log a
    assert posterior["b"].mean.item() == pytest.approx(0.25) and posterior[
        "b"
    ].var.item() == pytest.approx((1.5 * 0.4) ** 2 + 0.25)
    assert posterior["c"].support == "positive" and posterior["c"].mean.item() == pytest.approx(
        0.7 * -0.2 + slope * 0.3
    )
    assert posterior["c"].var.item() == pytest.approx(
        (slope * 0.4) ** 2 + (0.7 * 0.5) ** 2 + 0.3**2
    )


def hierarchy():
    m = pyro.sample("m", dist.Normal(torch.tensor(0.2), 3.0))
    pyro.sample("w", dist.Normal(m * torch.tensor([1.0, -2.0]), 1.4).to_event(1))


def moved(kind):
    """A guide of `hierarchy` with parameters of no special values."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = kind(hierarchy, init_loc_fn=init_to_median)
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.6 * torch.rand_like(parameter)
    return guide, bmr.Posterior.from_guide(guide, hierarchy)


def test_guides_that_follow_the_prior_of_the_program():
    """w = loc + weight · (m, −2m) + scale ε, or loc + scale · (m, −2m) + 1.4 scale ε; m with prior
    N(0.2, 3²) likewise.
    """
    times = torch.tensor([1.0, -2.0])
    guide, posterior = moved(AutoHierarchicalNormalMessenger)
    locs, scales, weights = (
        {name: getattr(part, name).detach() for name in "mw"}
        for part in (guide.locs, guide.scales, guide.weights)
    )
    mean_m, slope = locs["m"] + 0.2 * weights["m"], weights["w"] * times
    torch.testing.assert_close(posterior["w"].mean, locs["w"] + slope * mean_m)
    torch.testing.assert_close(
        posterior["w"].joint.cov,
        scales["m"] ** 2 * torch.outer(slope, slope) + scales["w"].square().diag(),
    )
    guide, posterior = moved(AutoRegressiveMessenger)
    locs, scales = (
        {name: getattr(part, name).detach() for name in "mw"} for part in (guide.locs, guide.scales)
    )
    slope = scales["w"] * times
    torch.testing.assert_close(
        posterior["w"].mean, locs["w"] + slope * (locs["m"] + 0.2 * scales["m"])
    )
    torch.testing.assert_close(
        posterior["w"].joint.cov,
        (3.0 * scales["m"]) ** 2 * torch.outer(slope, slope) + (1.4 * scales["w"]).square().diag(),
    )
    guide, posterior = moved(AutoNormalMessenger)
    torch.testing.assert_close(posterior["w"].var, guide.scales.w.detach().square())
    assert posterior["w"].joint is None


def test_autogaussian_by_its_precision():
    guide, posterior = moved(AutoGaussian)
    precision, rows = torch.zeros(3, 3), {"m": [0], "w": [1, 2]}
    for factor, upstream in guide.dependencies.items():
        root, index = (
            getattr(guide.prec_sqrts, factor).detach(),
            torch.tensor([row for name in upstream for row in rows[name]]),
        )
        precision[index[:, None], index] += root @ root.mT
    scale = torch.cat([guide.scales.m.detach()[None], guide.scales.w.detach()])
    cov = precision.inverse() * torch.outer(scale, scale)
    torch.testing.assert_close(posterior["w"].joint.cov, cov[1:, 1:])
    torch.testing.assert_close(posterior["m"].var, cov[0, 0])


def test_a_group_of_an_easy_guide_is_read_as_the_sites_that_it_is_cut_into():
    @easy_guide(hierarchy)
    def guide(self):
        self.group(match="m|w").sample(
            "both",
            dist.Normal(torch.tensor([0.4, -0.2, 1.7]), torch.tensor([0.3, 0.8, 0.6])).to_event(1),
        )

    posterior = bmr.Posterior.from_guide(guide, hierarchy)
    torch.testing.assert_close(posterior["w"].mean, torch.tensor([-0.2, 1.7]))
    torch.testing.assert_close(posterior["w"].var, torch.tensor([0.8, 0.6]).square())
    assert posterior["w"].joint is None and posterior["m"].var.item() == pytest.approx(0.09)


def test_many_entries_that_follow_few_draws_keep_a_low_rank():
    def wide():
        m = pyro.sample("m", dist.Normal(torch.tensor(0.2), 0.7))
        pyro.sample("w", dist.Normal(m * torch.linspace(-1, 1, 50_000), 0.4).to_event(1))

    def of():
        m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 2.0))
        pyro.sample("w", dist.Normal(m.expand(50_000), 1.0).to_event(1))

    site = bmr.Posterior.from_guide(wide, of)["w"]
    torch.testing.assert_close(site.var, (0.7 * torch.linspace(-1, 1, 50_000)).square() + 0.16)
    assert isinstance(site.joint, bmr.formulas.LowRank) and site.joint.factor.shape == (50_000, 1)


def funnel():
    s = pyro.sample("s", dist.LogNormal(torch.tensor(0.1), 0.5))
    pyro.sample("w", dist.Normal(torch.zeros(2), s).to_event(1))


def guide_of(draw):
    def guide():
        draw(pyro.sample("s", dist.LogNormal(torch.tensor(0.1), 0.5)))

    return guide


def w(fn, event_dim=1):
    return pyro.sample("w", fn.to_event(event_dim) if event_dim else fn)


REFUSED = {
    "a scale that follows": (lambda s: w(dist.Normal(torch.zeros(2), s)), "its scale changes"),
    "a curve": (lambda s: w(dist.Normal(s.square() * torch.ones(2), 0.3)), "no linear function"),
    "a point on a curve": (
        lambda s: w(dist.Delta(s * torch.ones(2), event_dim=1), 0),
        "no linear function",
    ),
    "a detached value": (
        lambda s: w(dist.Normal(s.detach() * torch.ones(2), 0.3)),
        "nothing that the guide draws by pyro.sample",
    ),
    "noise of its own": (
        lambda s: w(dist.Normal(torch.randn(2), 0.3)),
        "nothing that the guide draws by pyro.sample",
    ),
    "a mixture": (
        lambda s: w(
            dist.Normal(
                pyro.sample("k", dist.Bernoulli(0.5), infer={"is_auxiliary": True}) * torch.ones(2),
                0.3,
            )
        ),
        "site 'k': the guide's Bernoulli",
    ),
    "a Student": (
        lambda s: w(dist.StudentT(4.0, torch.zeros(2), 1.0)),
        "site 'w': the guide's StudentT cannot be read",
    ),
    "half a normal": (lambda s: w(dist.HalfNormal(torch.ones(2))), "site 'w'"),
    "positive where the program is real": (
        lambda s: w(dist.LogNormal(torch.zeros(2), 1.0)),
        "the support of the program, 'real', got 'positive' in the guide",
    ),
    "another shape": (
        lambda s: w(dist.Normal(torch.zeros(3), 1.0)),
        r"shape \(3,\), expected \(2,\)",
    ),
    "an infinite mean": (
        lambda s: w(dist.Delta(torch.tensor([1.0, torch.inf]), event_dim=1), 0),
        "infinite or NaN",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_gaussian_marginal_is_refused_by_name(case):
    draw, words = REFUSED[case]
    with pytest.raises(bmr.errors.ModelError, match=words):
        bmr.Posterior.from_guide(guide_of(draw), funnel)


def test_a_base_distribution_is_not_taken_for_the_site():
    """An affine transform of a Normal is a Normal of its own moments; a softplus of one is none on
    the log scale.
    """

    def guide():
        w(
            dist.TransformedDistribution(
                dist.Normal(torch.ones(2), 0.5), [dist.transforms.AffineTransform(3.0, -2.0)]
            )
        )
        pyro.sample("s", dist.LogNormal(torch.tensor(0.1), 0.5))

    site = bmr.Posterior.from_guide(guide, funnel)["w"]
    assert site.mean.tolist() == [1.0, 1.0] and site.var.tolist() == [1.0, 1.0]

    def soft():
        pyro.sample(
            "s",
            dist.TransformedDistribution(
                dist.Normal(torch.tensor(0.1), 0.5), [dist.transforms.SoftplusTransform()]
            ),
        )
        w(dist.Normal(torch.zeros(2), 1.0))

    with pytest.raises(bmr.errors.ModelError, match="site 's'.*no linear function"):
        bmr.Posterior.from_guide(soft, funnel)


def subsampled(x):
    with pyro.plate("rows", len(x), subsample_size=3) as rows:
        z = pyro.sample("z", dist.Normal(torch.tensor(0.2), 1.5))
        pyro.sample("y", dist.Normal(z, 1.0), obs=x[rows])


def test_a_latent_in_a_subsampled_plate_is_refused_by_name():
    x = torch.randn(9)
    guide = AutoNormal(subsampled)
    for read in (
        lambda: bmr.Posterior.from_guide(guide, subsampled, x),
        lambda: bmr.Posterior.from_guide(
            lambda x: pyro.sample("z", dist.Normal(torch.zeros(9), 1.0)), subsampled, x
        ),
        lambda: bmr.Posterior.from_param_store(
            {"a": torch.zeros(9), "b": torch.ones(9)}, subsampled, x, names={"z": ("a", "b")}
        ),
    ):
        with pytest.raises(
            bmr.errors.ModelError,
            match="site 'z': expected .*got the subsampled plate 'rows', which takes 3 of 9,",
        ):
            read()


def test_a_prior_that_is_infinite_at_the_posterior_point_is_refused():
    def wide():
        s = pyro.sample("s", dist.LogNormal(torch.tensor(0.0), 1.0))
        pyro.sample(
            "w",
            dist.Normal(torch.zeros(2), s * torch.tensor(1e38) * 100, validate_args=False).to_event(
                1
            ),
        )

    with pytest.raises(
        bmr.errors.ModelError, match="site 'w': its prior has a mean or scale that is infinite"
    ):
        bmr.Posterior.from_guide(
            lambda: (
                pyro.sample("s", dist.LogNormal(torch.tensor(0.0), 1.0)),
                w(dist.Normal(torch.zeros(2), 1.0)),
            ),
            wide,
        )


def test_reading_leaves_random_state_and_param_store_as_they_were():
    def guide():
        loc = pyro.param("loc_of_w", lambda: torch.randn(2))
        w(dist.Normal(loc, 1.0))
        pyro.sample(
            "s",
            dist.LogNormal(
                torch.tensor(0.1),
                pyro.param("scale_of_s", torch.tensor(0.4), constraint=dist.constraints.positive),
            ),
        )

    def raising():
        guide()
        raise ValueError

    pyro.clear_param_store()
    pyro.param("other", torch.tensor(2.0), constraint=dist.constraints.positive)
    torch.manual_seed(3)
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    bmr.Posterior.from_guide(guide, funnel)
    with pytest.raises(ValueError):
        bmr.Posterior.from_guide(raising, funnel)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numbers).all()
    assert {name: value.item() for name, value in pyro.get_param_store().items()} == {"other": 2.0}
    assert pyro.poutine.runtime._PYRO_STACK == []


def test_a_guide_is_not_read_with_the_values_of_another_in_the_store():
    pyro.clear_param_store()
    old = AutoNormal(funnel)
    old()
    pyro.clear_param_store()
    new = AutoNormal(funnel)
    new()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter += 5.0
    with pytest.raises(
        bmr.errors.ModelError,
        match=(
            "'AutoNormal.locs.s_unconstrained': the guide's own value is not that of Pyro's param"
            " store"
        ),
    ):
        bmr.Posterior.from_guide(old, funnel)
    assert bmr.Posterior.from_guide(new, funnel)["w"].mean.min() > 3
    pyro.clear_param_store()
    assert bmr.Posterior.from_guide(old, funnel)["w"].mean.max() < 3


def test_running_means_of_the_guide_stay():
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))

        def forward(self, x):
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(self.net(x), 0.5).to_event(1))

    def rows(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.5).to_event(1))

    torch.manual_seed(0)
    guide, x = Encoder(), torch.randn(6, 2)
    with torch.no_grad():
        wanted = guide.net(x)
    before = {name: buffer.clone() for name, buffer in guide.named_buffers()}
    torch.testing.assert_close(bmr.Posterior.from_guide(guide, rows, x)["z"].mean, wanted)
    assert all(torch.equal(buffer, before[name]) for name, buffer in guide.named_buffers())


def test_a_transform_that_hides_its_support_is_read_on_that_of_the_program():
    """Pyro makes the transform to the support of a half-Cauchy of two parts, which together claim
    the reals.
    """

    def half():
        pyro.sample("t", dist.HalfCauchy(torch.tensor(1.3)))

    pyro.clear_param_store()
    guide = AutoNormalMessenger(half, init_loc_fn=init_to_median)
    guide()
    site = bmr.Posterior.from_guide(guide, half)["t"]
    assert (
        site.support == "positive"
        and site.mean.item() == pytest.approx(guide.locs.t.item())
        and site.var.item() == pytest.approx(0.01)
    )


def test_a_program_under_masked_gives_its_masks_and_priors():
    mask = torch.tensor([True, False])
    handler = bmr.Masked({"w": mask})
    guide = guide_of(lambda s: w(dist.Normal(torch.ones(2), 0.3)))
    site = bmr.Posterior.from_guide(guide, handler(funnel))["w"]
    assert (
        site.mask.tolist() == mask.tolist()
        and site.mean.tolist() == [1.0, 0.0]
        and site.prior.var.item() == pytest.approx(np.exp(0.2))
    )
    with pytest.raises(bmr.errors.ModelError, match="under Masked; read it without"):
        bmr.Posterior.from_guide(handler(guide), funnel)


def test_a_guide_of_another_program_is_refused():
    def other():
        pyro.sample("w", dist.Normal(torch.tensor(0.2), 1.0))

    def of():
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(
        bmr.errors.ModelError,
        match=r"site 'w' has shape \(2,\) in the guide or posterior and \(\) in the program",
    ):
        bmr.Posterior.from_guide(bmr.MeanField(of), other)


def test_masks_that_fit_no_site():
    guide = guide_of(lambda s: w(dist.Normal(torch.zeros(2), 1.0)))
    with pytest.raises(bmr.errors.ModelError, match="guide: expected a Pyro guide"):
        bmr.Posterior.from_guide(None, funnel)
    with pytest.raises(
        bmr.errors.ModelError,
        match=(
            r"mask of site 'w': expected a bool tensor of shape \(2,\), got a bool tensor of shape"
            r" \(3,\)"
        ),
    ):
        bmr.Posterior.from_guide(bmr.FullRank(funnel), funnel, masks={"w": torch.ones(3) > 0})
    for masks, words in (
        ({"v": torch.ones(2) > 0}, "no site 'v'"),
        ({"w": torch.ones(2)}, "expected a bool tensor"),
        ({"w": torch.ones(1) > 0}, "shape"),
    ):
        with pytest.raises(bmr.errors.ModelError, match=words):
            bmr.Posterior.from_guide(guide, funnel, masks=masks)
