"""Posteriors from ArviZ's draws: chains and named dimensions, groups, refusals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pyro_bmr as bmr


class Variable:
    """As much of an xarray `DataArray` as is read."""

    def __init__(self, dims, values):
        self.dims, self.values = dims, np.asarray(values)

    def transpose(self, *names):
        order = [self.dims.index(name) for name in names[:-1]]
        rest = [k for k in range(len(self.dims)) if k not in order]
        axes = [*order, *rest]
        return Variable([self.dims[k] for k in axes], self.values.transpose(axes))


def draws():
    rng = np.random.default_rng(0)
    mix = np.array([[1.0, 0.4, 0.0], [0.0, 0.7, 0.0], [0.2, 0.0, 2.0]])
    return rng.standard_normal((4, 250, 3)) @ mix + np.array([0.5, -1.0, 2.0])


def tree(**variables):
    group = SimpleNamespace(data_vars=variables)
    return {"posterior": group, "observed_data": SimpleNamespace(data_vars={})}


def test_dimensions_are_found_by_name():
    w = draws()
    scale = np.exp(0.3 * np.random.default_rng(1).standard_normal((4, 250)))
    given = tree(
        w=Variable(["feature", "draw", "chain"], w.transpose(2, 1, 0)),
        scale=Variable(["draw", "chain"], scale.T),
    )
    prior = {"w": bmr.Gaussian(2.0)}
    supports = {"scale": "positive"}
    posterior = bmr.Posterior.from_arviz(given, prior, supports=supports, rows=70)
    flat = w.reshape(1000, 3)
    np.testing.assert_allclose(posterior.sites["w"].mean, flat.mean(0), atol=1e-12)
    np.testing.assert_allclose(posterior.sites["w"].joint.cov, np.cov(flat.T), atol=1e-12)
    np.testing.assert_allclose(posterior.sites["scale"].mean, np.log(scale).mean(), atol=1e-12)
    samples = {"w": torch.as_tensor(w), "scale": torch.as_tensor(scale)}
    same = bmr.Posterior.from_samples(samples, prior, supports=supports, chains=True)
    to = bmr.Gaussian(scale=0)
    one, other = (bmr.reduce(q, to=to) for q in (posterior, same))
    assert one.delta_f == other.delta_f and posterior.rows == 70
    alone = bmr.Posterior.from_arviz(given["posterior"], prior, var_names=["w"])
    assert list(alone.sites) == ["w"]


@pytest.mark.parametrize(
    ("given", "names", "said"),
    [
        (tree(w=Variable(["chain", "feature"], np.ones((2, 3)))), None, "chain and draw"),
        (tree(w=Variable(["chain", "draw"], np.ones((2, 3)))), ["v"], "var_names: expected"),
        (tree(w=Variable(["chain", "draw"], np.full((2, 3), 1j))), None, "real numbers"),
        ({"prior": None}, None, "tree: expected a DataTree"),
        (3, None, "tree: expected a DataTree"),
    ],
)
def test_what_is_no_posterior(given, names, said):
    with pytest.raises(bmr.errors.ModelError, match=said):
        bmr.Posterior.from_arviz(given, bmr.Gaussian(1.0), var_names=names)


@pytest.mark.slow
def test_trees_of_arviz():
    arviz = pytest.importorskip("arviz_base")
    w = draws()
    given = arviz.from_dict({"posterior": {"w": w}}, dims={"w": ["feature"]})
    for form in (given, given["posterior"], given["posterior"].to_dataset()):
        posterior = bmr.Posterior.from_arviz(form, bmr.Gaussian(2.0))
        np.testing.assert_allclose(posterior.sites["w"].mean, w.mean((0, 1)), atol=1e-12)
