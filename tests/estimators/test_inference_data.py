"""The draws of an estimator in ArviZ: summaries, leave-one-out, and back to a posterior."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import pyro_bmr as bmr


def rows(seed=0):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(rng.standard_normal((90, 3)), columns=["a", "b", "c"])
    return table, rng


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.sort_values")  # arviz-stats
def test_numbers():
    table, rng = rows()
    y = 10 + 3 * table["a"] + 0.5 * rng.standard_normal(90)
    model = bmr.SparseRegressor(steps=40, draws=800).fit(table, y)
    arviz_stats = pytest.importorskip("arviz_stats")
    tree = model.to_arviz(table, y)
    summary = arviz_stats.summary(tree, round_to="none")
    assert abs(float(summary.loc["coefficients[a]", "mean"]) - model.coef_[0]) < 0.02
    assert float(summary.loc["noise_sd", "r_hat"]) < 1.05
    each = tree["log_likelihood"]["y"].values.reshape(800, 90)
    mean = model.coef_draws_[7] @ table.to_numpy().T + model.intercept_draws_[7]
    exact = stats.norm.logpdf(y, mean, np.sqrt(model.noise_draws_[7]))
    np.testing.assert_allclose(each[7], exact, atol=1e-12)
    assert arviz_stats.loo(tree).p < 5
    worse = bmr.SparseRegressor(steps=40, draws=800).fit(table[["b", "c"]], y)
    compared = arviz_stats.compare({"a": tree, "none": worse.to_arviz(table[["b", "c"]], y)})
    assert compared.index[0] == "a"
    full = bmr.SparseRegressor(prior="gaussian", draws=800).fit(table, y)
    back = bmr.Posterior.from_arviz(full.to_arviz(), bmr.Gaussian(5.0), var_names=["coefficients"])
    np.testing.assert_allclose(back.sites["coefficients"].mean, full.coef_draws_.mean(0))
    new = tree["posterior_predictive"]["y"].values
    assert abs(new.mean() - y.mean()) < 0.1 and new.shape == (4, 200, 90)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
def test_classes(classes):
    table, rng = rows(1)
    eta = 2 * table["a"] + rng.logistic(size=90)
    y = np.array(["p", "q", "r"])[np.digitize(eta, [-1, 1][: classes - 1])]
    model = bmr.SparseClassifier(steps=40, draws=400).fit(table, y)
    tree = model.to_arviz(table, y)
    each = np.exp(tree["log_likelihood"]["y"].values.reshape(400, 90).astype(float))
    labels = np.searchsorted(model.classes_, y)
    probability = model.predict_proba(table)
    np.testing.assert_allclose(each.mean(0), probability[np.arange(90), labels], atol=1e-10)
    new = tree["posterior_predictive"]["y"].values.reshape(400, 90)
    shares = np.stack([(new == k).mean(0) for k in range(classes)], 1)
    assert np.abs(shares - probability).max() < 0.12
    names = tree["posterior"]["coefficients"].dims
    assert names[2:] == (("class", "coefficient") if classes == 3 else ("coefficient",))


@pytest.mark.slow
def test_counts_and_refusals():
    table, rng = rows(2)
    y = rng.poisson(np.exp(1 + 0.5 * table["a"]))
    model = bmr.SparseRegressor(family="poisson", steps=20, draws=200).fit(table, y)
    tree = model.to_arviz(table, y)
    each = tree["log_likelihood"]["y"].values.reshape(200, 90)
    rate = np.exp(model.coef_draws_[3] @ table.to_numpy().T + model.intercept_draws_[3])
    np.testing.assert_allclose(each[3], stats.poisson.logpmf(y, rate), atol=1e-10)
    with pytest.raises(ValueError, match="X and y together"):
        model.to_arviz(table)
