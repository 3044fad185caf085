"""Tables with texts, missing values and bad input; the estimators end to end."""

import warnings

import numpy as np
import pandas as pd
import pytest

import pyro_bmr as bmr
from pyro_bmr.estimators.columns import fit_columns


def table(rows=80, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "age": rng.normal(50, 10, rows),
            "dose": rng.choice([1.0, 2.0, 5.0], rows),
            "site": rng.choice(["north", "south", "west"], rows),
            "smoker": rng.random(rows) < 0.4,
            "noise": rng.standard_normal(rows),
        }
    )
    effect = frame["site"].map({"north": 0.0, "south": 3.0, "west": 0.0})
    y = 100 + 0.4 * frame["age"] + effect + rng.standard_normal(rows)
    return frame, y.rename("pressure")


def small(estimator=bmr.SparseRegressor, **options):
    return estimator(steps=40, draws=200, **options)


def test_a_table_becomes_a_regression_and_back():
    frame, _ = table()
    frame.loc[3, "age"] = np.nan
    frame.loc[5, "site"] = None
    columns = fit_columns(frame)
    assert columns.names == [
        *("age", "dose", "smoker", "noise", "age missing"),
        *("site=missing", "site=north", "site=south", "site=west"),
    ]
    assert [len(group) for group in columns.groups] == [1, 1, 1, 1, 1, 3]
    x = columns.matrix(frame)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose((x[:, :5] ** 2).mean(0), 1)
    b = np.random.default_rng(1).standard_normal((4, x.shape[1]))
    coefficients = columns.coefficients(b)
    encoded = columns.encoded(frame)
    assert encoded[3, 0] == frame["age"].median() and encoded[5, 5] == 1
    np.testing.assert_allclose(
        encoded @ coefficients.T - columns.offset(coefficients), x @ b.T, atol=1e-10
    )
    np.testing.assert_allclose(coefficients[:, 5:].sum(1), 0, atol=1e-12)


def test_columns_without_information_are_left_out():
    frame, y = table(20)
    frame["constant"], frame["empty"] = 7, np.nan
    frame["name"] = [f"patient {k}" for k in range(20)]
    with pytest.warns(bmr.PyroBMRWarning) as caught:
        model = small().fit(frame, y)
    said = " ".join(str(warning.message) for warning in caught)
    assert "'empty' (nothing but missing values)" in said and "constant columns" in said
    assert "'name' (20 different texts in 20 rows)" in said
    assert not {"constant", "empty", "name"} & {n.split("=")[0] for n in model.summary().index}


def test_an_unknown_category_is_the_mean_of_the_known():
    frame, y = table()
    model = small().fit(frame, y)
    new = frame.iloc[[0]].assign(site="east")
    with pytest.warns(bmr.PyroBMRWarning, match=r"'site': 1 categories .* 'east'"):
        found = model.predict(new)
    each = [model.predict(new.assign(site=name)) for name in ("north", "south", "west")]
    assert found == pytest.approx(np.mean(each))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.drop(columns="age"), "age"),
        (lambda f: f.rename(columns={"age": "years"}), "years"),
        (lambda f: f[[*f.columns[1:], "age"]], "order"),
    ],
)
def test_columns_that_differ_at_prediction(change, said):
    frame, y = table()
    with pytest.raises(ValueError, match=said):
        small().fit(frame, y).predict(change(frame))


@pytest.mark.parametrize(
    ("fit", "said"),
    [
        (lambda f, y: small().fit(f, y.where(y.index != 4)), "y contains NaN"),
        (lambda f, y: small(bmr.SparseClassifier).fit(f, [None, *["a", "b"] * 40][:80]), "missing"),
        (lambda f, y: small(bmr.SparseClassifier).fit(f, ["a"] * 80), "two classes"),
        (lambda f, y: small(family="poisson").fit(f, y), "counts"),
        (lambda f, y: small(family="gamma").fit(f, y), "family: expected one of normal"),
        (lambda f, y: small(prior="lasso").fit(f, y), "prior: expected one of spike-and-slab"),
        (
            lambda f, y: small(prior="horseshoe", family="poisson").fit(f, y.round()),
            "prior: expected",
        ),
        (lambda f, y: bmr.SparseRegressor(draws=0).fit(f, y), "draws: expected a whole number"),
        (lambda f, y: small().fit(f.assign(day=pd.Timestamp("2020-01-01")), y), "'day'"),
        (lambda f, y: small().fit(f, y).predict_interval(f, 1.5), "level: expected"),
    ],
)
def test_what_cannot_be_fitted(fit, said):
    with pytest.raises(ValueError, match=said) as raised:
        fit(*table())
    assert not isinstance(raised.value, AssertionError)


@pytest.mark.parametrize("prior", ["spike-and-slab", "horseshoe", "gaussian"])
def test_a_regression_in_the_units_of_the_table(prior):
    frame, y = table()
    model = small(prior=prior).fit(frame, y)
    summary = model.summary()
    assert list(summary) == ["mean", "sd", "5%", "95%", "inclusion", "delta_f"]
    kept = summary.index[1:][model.kept_]
    assert list(kept) == ["age", "site=north", "site=south", "site=west"]
    assert summary.loc["age", "mean"] == pytest.approx(0.4, abs=0.05)
    assert summary.loc["site=south", "mean"] == pytest.approx(2.0, abs=0.5)
    assert summary.loc["age", "delta_f"] < -50 < 0 < summary.loc["noise", "delta_f"]
    mean, sd = model.predict(frame, return_std=True)
    interval = model.predict_interval(frame)
    assert 0.7 < sd.mean() < 1.4 and ((interval[:, 0] < mean) & (mean < interval[:, 1])).all()
    assert 0.8 < ((interval[:, 0] < y) & (y < interval[:, 1])).mean() < 1
    again = small(prior=prior).fit(frame, y)
    pd.testing.assert_frame_equal(again.summary(), summary)


def test_units_do_not_matter():
    frame, y = table()
    one = small().fit(frame, y)
    other = small().fit(frame.assign(age=frame["age"] * 1e6 + 3), 1e-3 * y - 5)
    np.testing.assert_allclose(other.inclusion_, one.inclusion_, atol=1e-6)
    assert other.coef_[0] * 1e9 == pytest.approx(one.coef_[0], rel=1e-6)
    np.testing.assert_allclose(1e-3 * one.predict(frame) - 5, other.predict(
        frame.assign(age=frame["age"] * 1e6 + 3)))  # fmt: skip


def test_many_rows_are_predicted_some_at_a_time():
    frame, y = table()
    model = small().fit(frame, y)
    many = pd.concat([frame] * 27, ignore_index=True)
    for one, all_ in zip(
        model.predict(frame, return_std=True), model.predict(many, return_std=True), strict=True
    ):
        np.testing.assert_allclose(all_, np.tile(one, 27), rtol=1e-12)
    assert model.predict_interval(many).shape == (2160, 2)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_classification(classes):
    frame, _ = table(150, 2)
    eta = (frame["age"] - 50).to_numpy() * 0.3 + np.random.default_rng(3).logistic(size=150)
    labels = np.array(["low", "middle", "high"])[np.digitize(eta, [-2, 2][: classes - 1])]
    model = small(bmr.SparseClassifier).fit(frame, labels)
    probability = model.predict_proba(frame)
    np.testing.assert_allclose(probability.sum(1), 1)
    assert list(np.array(model.coefficient_names_)[model.kept_]) == ["age"]
    assert model.score(frame, labels) > 0.7
    rows = model.summary().loc["age"]
    if classes == 3:
        assert list(rows.index) == ["high", "low", "middle"]
        assert rows.loc["high", "mean"] > 0 > rows.loc["low", "mean"]
        assert rows["mean"].sum() == pytest.approx(0, abs=1e-12)
    else:
        assert rows["mean"] > 0 if model.classes_[1] == "middle" else rows["mean"] < 0
    # calibrated on the rows that it was fitted to
    share = (labels == model.classes_[0]).mean()
    assert probability[:, 0].mean() == pytest.approx(share, abs=0.03)


def test_counts():
    frame, _ = table(150, 4)
    rng = np.random.default_rng(5)
    y = rng.poisson(np.exp(0.5 + 0.08 * (frame["age"] - 50)))
    model = small(family="poisson").fit(frame, y)
    assert model.summary().loc["age", "mean"] == pytest.approx(0.08, abs=0.02)
    mean, sd = model.predict(frame, return_std=True)
    assert mean.mean() == pytest.approx(y.mean(), rel=0.1) and (sd**2 >= mean).all()
    low, high = model.predict_interval(frame).T
    assert ((low <= y) & (y <= high)).mean() > 0.85


def test_counts_that_vary_more():
    frame, _ = table(300, 6)
    rng = np.random.default_rng(7)
    rate = np.exp(1.5 + 0.08 * (frame["age"] - 50)).to_numpy()
    y = rng.poisson(rate * rng.gamma(2.0, 0.5, 300))
    with pytest.warns(bmr.PyroBMRWarning, match=r"counts vary \d+\.\d times"):
        small(family="poisson").fit(frame, y)
    model = small(family="negative-binomial").fit(frame, y)
    assert model.concentration_ == pytest.approx(2.0, rel=0.35)
    mean, sd = model.predict(frame, return_std=True)
    assert sd.mean() == pytest.approx(np.sqrt(rate + rate**2 / 2).mean(), rel=0.2)
    low, high = model.predict_interval(frame).T
    assert 0.87 < ((low <= y) & (y <= high)).mean() < 0.98 and mean.mean() > 0
    assert list(np.array(model.coefficient_names_)[model.kept_]) == ["age"]


@pytest.mark.slow
def test_pictures():
    frame, y = table()
    model = small().fit(frame, y)
    assert len(model.plot().axes) == 2 and len(model.plot(frame, y).axes) == 3
    labels = np.where(y > y.mean(), "high", "low")
    assert len(small(bmr.SparseClassifier).fit(frame, labels).plot(frame, labels).axes) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    [bmr.SparseRegressor, bmr.SparseClassifier],
)
@pytest.mark.parametrize("prior", ["spike-and-slab", "gaussian"])
def test_scikit_learn_accepts_the_estimator(estimator, prior):
    from sklearn.utils.estimator_checks import check_estimator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(
            estimator(prior=prior, steps=20, draws=50), on_skip=None, on_fail=None
        )
    failed = [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"]
    assert not failed and len(results) > 40


@pytest.mark.slow
def test_four_strong_effects_among_a_thousand_columns():
    for seed in range(3):
        rng = np.random.default_rng(100 + seed)
        x = rng.standard_normal((100, 1000))
        y = 2 * x[:, 3] - 1.5 * x[:, 400] + x[:, 700] - x[:, 999] + 0.7 * rng.standard_normal(100)
        model = bmr.SparseRegressor(random_state=seed).fit(x, y)
        assert model.kept_[[3, 400, 700, 999]].all() and model.kept_.sum() <= 7


@pytest.mark.slow
def test_coverage_of_intervals():
    inside, width = [], []
    for seed in range(40):
        rng = np.random.default_rng(500 + seed)
        x = rng.standard_normal((80, 15)) + 0.8 * rng.standard_normal((80, 1))
        beta = np.zeros(15)
        beta[:4] = rng.choice([-1, 1], 4) * rng.uniform(0.5, 2, 4)
        model = bmr.SparseRegressor(steps=200).fit(x, x @ beta + rng.standard_normal(80))
        low, high = np.quantile(model.coef_draws_, [0.05, 0.95], axis=0)
        inside.append((low <= beta) & (beta <= high))
        width.append(high - low)
    inside = np.array(inside)
    assert 0.85 < inside[:, :4].mean() < 0.95 and inside.mean() > 0.9
