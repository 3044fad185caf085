"""Reading posteriors out of guides and param stores, drawing, saving, loading."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoNormal
from torch import nn

import pyro_bmr as bmr

X = torch.randn(30, 3)
Y = X @ torch.tensor([1.0, 0.0, -2.0])


def program(x, y=None):
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.2), 0.5))
    w = pyro.sample("w", dist.Normal(torch.tensor(0.3), scale).expand([3]).to_event(1))
    v = pyro.sample("v", dist.Normal(torch.tensor(-0.4), 1.5).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w + v.sum(), 1.0), obs=y)


def hand_guide(x, y=None):
    pyro.sample("scale", dist.LogNormal(torch.tensor(0.4), 0.25))
    pyro.sample(
        "w", dist.Normal(torch.tensor([0.9, 0.1, -1.8]), torch.tensor([0.1, 0.2, 0.3])).to_event(1)
    )
    pyro.sample("v", dist.Normal(torch.zeros(2), 0.7).to_event(1))


def test_a_hand_written_guide():
    posterior = bmr.Posterior.from_guide(hand_guide, program, X, Y)
    assert list(posterior) == ["scale", "w", "v"]
    torch.testing.assert_close(posterior["w"].mean, torch.tensor([0.9, 0.1, -1.8]))
    torch.testing.assert_close(posterior["w"].var, torch.tensor([0.01, 0.04, 0.09]))
    assert posterior["scale"].support == "positive" and posterior[
        "scale"
    ].mean.item() == pytest.approx(0.4)
    assert posterior.point()["scale"].item() == pytest.approx(1.4918, abs=1e-4)  # the median, e^0.4


def test_the_priors_come_from_the_program_and_say_what_they_depend_on():
    posterior = bmr.Posterior.from_guide(hand_guide, program, X, Y)
    assert posterior["w"].prior.mean.item() == pytest.approx(0.3)
    # at the median of the scale
    assert posterior["w"].prior.var.item() == pytest.approx(1.4918**2, abs=1e-3)
    assert posterior["w"].given == ("scale",) and posterior["v"].given == ()
    assert posterior["v"].prior.var.item() == pytest.approx(2.25)
    assert posterior["scale"].prior is None


def test_mean_field_and_autonormal_give_their_own_moments():
    guide = bmr.MeanField(program, X, Y)
    posterior = bmr.Posterior.from_guide(guide, program, X, Y)
    torch.testing.assert_close(posterior["w"].mean, guide.views(guide.loc.detach())["w"])
    torch.testing.assert_close(
        posterior["w"].var, guide.views(guide.log_scale.detach())["w"].exp().square()
    )
    auto = AutoNormal(program)
    auto(X, Y)
    posterior = bmr.Posterior.from_guide(auto, program, X, Y)
    assert posterior["scale"].support == "positive" and posterior["w"].support == "real"
    torch.testing.assert_close(posterior["w"].var, auto.scales.w.detach().square())


@pytest.mark.slow
def test_a_param_store_written_by_a_plain_script_and_a_second_fit_in_the_same_process():
    guide = AutoNormal(program)
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(150):
        svi.step(X, Y)
    store = pyro.get_param_store()
    before = {k: v.detach().clone() for k, v in store.items()}
    posterior = bmr.Posterior.from_param_store(store, program, X, Y)
    torch.testing.assert_close(posterior["w"].mean, store["AutoNormal.locs.w"].detach())
    torch.testing.assert_close(posterior["w"].var, store["AutoNormal.scales.w"].detach().square())
    torch.testing.assert_close(
        posterior["scale"].mean, bmr.Posterior.from_guide(guide, program, X, Y)["scale"].mean
    )
    fit = bmr.fit(program, (X, Y), guide=AutoNormal, epochs=2, progress=False)
    # a new fit starts anew ...
    assert abs(fit.posterior["w"].mean[0] - posterior["w"].mean[0]) > 0.1
    # ... and leaves the store alone
    assert before.keys() == dict(store.items()).keys() and all(
        torch.equal(store[k], v) for k, v in before.items()
    )


def test_other_names_in_the_store_and_a_missing_one():
    store = {
        "a": torch.tensor([1.0, 2.0, 3.0]),
        "b": torch.tensor(0.2),
        "c": torch.zeros(2),
        "d": torch.ones(2),
        "e": torch.tensor(0.1),
        "f": torch.tensor(0.3),
    }
    names = {"w": ("a", "b"), "v": ("c", "d"), "scale": ("e", "f")}
    posterior = bmr.Posterior.from_param_store(store, program, X, Y, names=names)
    torch.testing.assert_close(posterior["w"].var, torch.full((3,), 0.04))
    with pytest.raises(bmr.errors.ModelError, match=r"site 'scale'.*names="):
        bmr.Posterior.from_param_store({}, program, X, Y)


def test_a_point_guide_has_no_variance_and_cannot_be_reduced():
    auto = AutoDelta(program)
    posterior = bmr.Posterior.from_guide(auto, program, X, Y)
    assert not posterior["w"].var.any()
    with pytest.raises(bmr.errors.ReductionError, match="site 'w'.*point estimate"):
        bmr.reduce(posterior, to={"w": bmr.Gaussian(0)})


def test_guides_that_cannot_be_read_are_refused_by_name_and_site():
    with pytest.raises(
        bmr.errors.ModelError,
        match=(
            "site 'scale': the posterior of AutoIAFNormal cannot be read.*AutoLaplaceApproximation"
        ),
    ):
        bmr.Posterior.from_guide(AutoIAFNormal(program), program, X, Y)

    def student(x, y=None):
        pyro.sample("v", dist.StudentT(4.0, torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(bmr.errors.ModelError, match="site 'v'.*StudentT cannot be read"):
        bmr.Posterior.from_guide(student, program, X, Y)


def test_draws_have_the_moments_and_the_zeros():
    mask = torch.tensor([True, False, True])
    posterior = bmr.Posterior.from_guide(hand_guide, program, X, Y, masks={"w": mask})
    generator = torch.Generator().manual_seed(1)
    draws = [posterior.draw(generator) for _ in range(4000)]
    w, scale = torch.stack([d["w"] for d in draws]), torch.stack([d["scale"] for d in draws])
    assert not w[:, 1].any()
    assert w[:, 2].mean().item() == pytest.approx(-1.8, abs=0.02) and w[
        :, 2
    ].std().item() == pytest.approx(0.3, rel=0.05)
    assert scale.log().mean().item() == pytest.approx(
        0.4, abs=0.02
    ) and scale.log().std().item() == pytest.approx(0.25, rel=0.05)
    assert posterior["w"].mean[1] == 0 and posterior["w"].var[1] == 0


def test_save_and_load(tmp_path):
    net = nn.Linear(3, 2)
    model = bmr.BayesianNetwork(
        net,
        {"weight": bmr.Horseshoe(0.3, None, ("layer", "unit")), "bias": bmr.Gaussian()},
        bmr.Categorical(),
    )
    guide = bmr.MeanField(model, X, torch.zeros(30).long())
    masks = {"weight": torch.rand(2, 3) < 0.5}
    posterior = bmr.Posterior.from_guide(
        guide, model, X, torch.zeros(30).long(), masks=masks, temperature=0.3
    )
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = bmr.Posterior.load(tmp_path / "posterior.safetensors")
    assert list(loaded) == list(posterior) and loaded.temperature == 0.3
    for name in posterior:
        a, b = posterior[name], loaded[name]
        assert (
            torch.equal(a.mean, b.mean)
            and torch.equal(a.var, b.var)
            and (a.declared, a.support, a.given) == (b.declared, b.support, b.given)
        )
    assert torch.equal(loaded["weight"].mask, masks["weight"])
    torch.testing.assert_close(
        bmr.reduce(loaded, to=None).masks, bmr.reduce(posterior, to=None).masks
    )


def test_files_that_are_not_posteriors(tmp_path):
    path = tmp_path / "posterior.safetensors"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(
        bmr.errors.ModelError, match="posterior.safetensors: not a readable safetensors file"
    ):
        bmr.Posterior.load(path)
    bmr.save({"w": torch.ones(3)}, tmp_path / "x")
    with pytest.raises(bmr.errors.ModelError, match="not a saved posterior"):
        bmr.Posterior.load(tmp_path / "x" / "model.safetensors")
    with pytest.raises(bmr.errors.ModelError, match="nowhere"):
        bmr.Posterior.load(tmp_path / "nowhere")


def test_unknown_site_and_bad_mask():
    posterior = bmr.Posterior.from_guide(hand_guide, program, X, Y)
    with pytest.raises(bmr.errors.ModelError, match="no site 'u'; its sites are: scale, w, v"):
        posterior["u"]
    with pytest.raises(bmr.errors.ReductionError, match=r"mask of site 'w'.*shape \(3,\)"):
        posterior.masked({"w": torch.ones(2, dtype=torch.bool)})


def test_a_posterior_does_not_follow_the_guide():
    guide = bmr.MeanField(program, X, Y)
    posterior = bmr.Posterior.from_guide(guide, program, X, Y)
    before = posterior["w"].mean.clone()
    with torch.no_grad():
        guide.loc.add_(1.0)
    assert torch.equal(posterior["w"].mean, before)


def test_point_guides_have_the_supports_of_the_program():
    posterior = bmr.Posterior.from_guide(bmr.Point(program, X, Y), program, X, Y)
    # log of the median
    assert posterior["scale"].support == "positive" and posterior[
        "scale"
    ].mean.item() == pytest.approx(0.2, abs=1e-5)
    assert posterior.point()["scale"].item() == pytest.approx(1.2214, abs=1e-4)


def test_saving_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(bmr.PyroBMRError, match="cannot write"):
        bmr.Posterior.from_guide(hand_guide, program, X, Y).save(
            tmp_path / "file" / "posterior.safetensors"
        )


def test_variances_below_the_range_of_float32_are_refused_and_kept_in_float64():
    """Of a variance of 1e-42 float32 keeps three digits, of 1e-50 none."""
    mean, var = torch.tensor([1e-22, 2e-22]), torch.tensor([0.7e-42, 0.4e-42], dtype=torch.float64)
    with pytest.raises(
        bmr.errors.ModelError,
        match="site 'w': the variance is below the range of torch.float32 for 2 of 2",
    ):
        bmr.Posterior.from_moments({"w": mean}, {"w": var}, bmr.Gaussian(1.0))
    with pytest.raises(
        bmr.errors.ModelError, match="site 'w': the prior's variance is below the range"
    ):
        bmr.Posterior.from_moments({"w": mean}, {"w": torch.tensor(1e-30)}, bmr.Gaussian(1e-21))
    post = bmr.Posterior.from_moments({"w": mean.double()}, {"w": var}, bmr.Gaussian(1e-21))
    exact = dist.Normal(1e21 * mean.double(), (1e42 * var).sqrt()).log_prob(
        torch.tensor(0.0)
    ) - dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    torch.testing.assert_close(bmr.reduce(post, to=bmr.Gaussian(0)).sites["w"].spike_delta_f, exact)

    def tiny(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1e-21).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x, y = torch.ones(3, 2), torch.zeros(3)
    with pytest.raises(
        bmr.errors.ModelError, match="site 'w': the prior's variance is below the range"
    ):
        bmr.Posterior.from_guide(bmr.MeanField(tiny, x, y), tiny, x, y)


@pytest.mark.parametrize("mask", [False, torch.tensor([True, False])])
def test_a_prior_that_poutine_masks_is_not_read_as_declared(mask):
    def program(x, y=None):
        with pyro.poutine.mask(mask=mask):
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 0.1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x, y = torch.ones(3, 2), torch.zeros(3)
    with pytest.raises(bmr.errors.ModelError, match="site 'w': poutine.mask"):
        bmr.Posterior.from_guide(
            lambda x, y=None: pyro.sample("w", dist.Normal(torch.ones(2), 0.1)), program, x, y
        )
    with pytest.raises(bmr.errors.ModelError, match="site 'w': poutine.mask"):
        bmr.fit(program, (x, y), epochs=1, progress=False)
