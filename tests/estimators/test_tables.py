"""Tables with texts, missing values and bad input; the estimators end to end."""

import datetime
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import NotFittedError

import pyro_bmr as bmr
from pyro_bmr.data.table_encoding import TableError
from pyro_bmr.estimators.columns import alike, alike_names, fit_columns
from tests.parameters import others_slow


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
            lambda f, y: small(engine="nuts").fit(f, y),
            "engine: expected None or one of search, mean",
        ),
        (lambda f, y: small(family=bmr.StudentT(4.0)).fit(f, y), "bmr.likelihoods.StudentT"),
        (lambda f, y: small(family=bmr.Poisson(missing="ignore")).fit(f, y), "exposure alone"),
        (lambda f, y: small(family=bmr.Normal(noise="network")).fit(f, y), "the same for all rows"),
        (lambda f, y: small(family=bmr.Poisson(exposure="t")).fit(f, y.round()), "exposure: expec"),
        (
            lambda f, y: small(family=bmr.Poisson(exposure="noise")).fit(f, y.round()),
            "a finite exposure > 0 in each row of the column 'noise'",
        ),
        (
            lambda f, y: small(bmr.SparseClassifier, family="bernoulli").fit(f, f["site"]),
            "expected 2 classes",
        ),
        (
            lambda f, y: small(bmr.SparseClassifier, family=bmr.Ordinal(4)).fit(f, f["site"]),
            "expected 4 classes",
        ),
        (lambda f, y: bmr.SparseRegressor(draws=0).fit(f, y), "draws: expected a whole number"),
        (
            lambda f, y: small().fit(f, (1e6 + y).map("{:,.1f}".format)),
            "y: could not convert string",
        ),
        (lambda f, y: small().fit(f, np.stack([y, y], 1)), "y: y should be a 1d array"),
        (lambda f, y: small().fit(f.assign(noise=np.inf), y), "'noise': expected finite .* row 0"),
        (lambda f, y: small().fit(pd.concat({"all": f}, axis=1), y), "X: expected names of one"),
        (lambda f, y: small(family="poisson").fit(f, 0 * y), "y: expected a count above 0"),
        (lambda f, y: small().fit(f, y).predict(f.iloc[:0]), "X: expected at least one row"),
        (
            lambda f, y: small().fit(f, y).predict(f.assign(noise=["1", "a"] * 40)),
            "'noise': expected numbers, as in training, got 'a' in row 1",
        ),
        (lambda f, y: small().fit(f.assign(day=pd.Timestamp("2020-01-01")), y), "'day'"),
        (lambda f, y: small().fit(f, y).predict_interval(f, 1.5), "level: expected"),
    ],
)
def test_what_cannot_be_fitted(fit, said):
    with pytest.raises(ValueError, match=said) as raised:
        fit(*table())
    assert isinstance(raised.value, bmr.errors.PyroBMRError)


ROWS = {
    "fit": lambda model, f, y: model.fit(f, y),
    "score": lambda model, f, y: model.score(f, y),
    "weights": lambda model, f, y: model.score(f, y.to_numpy(), y.reset_index(drop=True)[y.index]),
    "plot": lambda model, f, y: model.plot(f, y),
    "to_arviz": lambda model, f, y: model.to_arviz(f, y),
}


@pytest.mark.parametrize("call", ROWS)
@pytest.mark.parametrize("estimator", [bmr.SparseRegressor, bmr.SparseClassifier])
def test_rows_of_a_target_in_another_order_are_refused(estimator, call):
    frame, y = table()
    y = y if estimator is bmr.SparseRegressor else (y > y.mean()).astype(int)
    model = small(estimator).fit(frame, y)
    argument = "sample_weight" if call == "weights" else "y"
    with pytest.raises(TableError, match=f"X and {argument}: .*give {argument}.loc.X.index"):
        ROWS[call](model, frame, y.sample(frac=1, random_state=0))
    with pytest.raises(TableError, match="X and y: .*give both in one order"):  # labels twice
        model.fit(frame.set_axis(frame.index // 2), y.set_axis(y.index[::-1] // 2))
    with pytest.warns(bmr.PyroBMRWarning, match="X and y are tables with different indexes"):
        assert model.score(frame, y.set_axis(y.index + 100)) == model.score(frame, y)


OBJECTS = {
    "a list": ([1, 2], r"\[1, 2\]"),
    "a dict": ({"a": 1}, "{'a': 1}"),
    "a set": ({1}, "a set of 1"),
    "an array": (np.ones(3), "a float64 array of shape .3,."),
    "a tuple": ((1, 2), r"\(1, 2\)"),
    "a date": (datetime.date(2020, 1, 1), "a date"),
    "a period": (pd.Period("2020-01-01"), "a Period"),
    "a complex number": (1j, "1j"),
}


@pytest.mark.parametrize("case", OBJECTS)
def test_cells_of_other_objects_are_refused(case):
    cell, said = OBJECTS[case]
    frame, y = table()
    model = small().fit(frame, y)
    for name, usual in (("site", "north"), ("noise", 0.5)):
        column = pd.Series([*[usual] * 79, cell], dtype=object)
        for call in (small().fit, lambda f, _: model.predict(f)):
            with pytest.raises(TableError, match=f"'{name}': expected numbers.*{said} in row 79"):
                call(frame.assign(**{name: column}), y)
        for estimator in (bmr.SparseRegressor, bmr.SparseClassifier):
            with pytest.raises(TableError, match="^y: "):
                small(estimator).fit(frame, column)


@pytest.mark.parametrize("value", [3.0, 0.0, 0.1, 0.1 + 1e-16 * np.arange(80), -7e15])
@pytest.mark.parametrize(
    "family", others_slow(["normal", "student-t", bmr.likelihoods.StudentT(4.0)], "normal")
)
def test_a_constant_target_is_told(family, value):
    frame, y = table()
    y = 0 * y + value
    with pytest.warns(bmr.PyroBMRWarning, match="y is the same in all 80 rows.*nothing to predict"):
        mean, sd = small(family=family).fit(frame, y).predict(frame, return_std=True)
    assert mean == pytest.approx(y.to_numpy(), rel=1e-9, abs=1e-6) and sd.max() < 1e-6
    mean, sd = small(family=bmr.Normal(noise=2.0)).fit(frame, y).predict(frame, return_std=True)
    assert sd.min() > 1.9
    if family == "normal":
        for prior in ("gaussian", "horseshoe"):
            with pytest.raises(TableError, match="y: expected a target that varies for prior"):
                small(prior=prior).fit(frame, y)


@pytest.mark.parametrize("family", ["poisson", "negative-binomial"])
@pytest.mark.parametrize("value", [1, 3])
def test_counts_that_are_all_the_same(family, value):
    frame, y = table()
    mean = small(family=family).fit(frame, 0 * y + value).predict(frame)
    assert mean == pytest.approx(value, rel=0.2)


@pytest.mark.parametrize(("large", "small_steps"), [(1e9, 1e-4), (1.7e18, 1e5)])
def test_a_target_that_varies_little_is_not_constant(large, small_steps):
    frame, _ = table()
    y = large + small_steps * (frame["age"] - frame["age"].mean()) / frame["age"].std()
    model = small().fit(frame[["age", "noise"]], y)
    assert model.kept_.tolist() == [True, False]


def copies():
    """Columns of which some are others in other units or words."""
    frame, y = table(120)
    frame["days"] = 5 - 365 * frame["age"]
    frame["about"] = frame["age"] + frame["noise"]  # r = 0.995
    frame["apart"] = frame["age"] + 4 * frame["noise"]  # r = 0.93
    frame["place"] = frame["site"].map({"north": "m", "south": "z", "west": "a"})
    frame["never"] = np.where(frame["smoker"], "no", "yes")
    return frame.assign(one=1.0, two=1.0), y


@pytest.mark.parametrize("prior", ["spike-and-slab", "gaussian", "horseshoe"])
@pytest.mark.parametrize("estimator", [bmr.SparseRegressor, bmr.SparseClassifier])
def test_columns_that_are_nearly_the_same_are_told(estimator, prior):
    frame, y = copies()
    y = y if estimator is bmr.SparseRegressor else y > y.mean()
    with pytest.warns(bmr.PyroBMRWarning) as told:
        model = estimator(steps=10, draws=20, prior=prior).fit(frame, y)
    said = [str(one.message) for one in told if "0.99" in str(one.message)]
    groups = [["age", "days", "about"], ["smoker", "never"], ["site", "place"]]
    assert model.alike_ == groups and len(said) == 1
    assert "age, days, about; smoker, never; site, place. Their effect" in said[0]
    plain = table()[0]
    assert small().fit(plain, plain["noise"]).alike_ == []


def test_many_columns_that_are_the_same(monkeypatch):
    """A chain of pairs over the blocks in which correlations are computed is one group."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 3000))
    x[:, [10, 1500, 2900]] = x[:, :1]
    x[:, 7] = -x[:, 2999]
    x -= x.mean(0)
    groups = [np.array([k]) for k in range(3000)]
    r = np.abs(np.corrcoef(x.T)) > 0.99
    found = alike(x, groups, np.zeros(3000))
    assert found == [[0, 10, 1500, 2900], [7, 2999]] and r.sum() == 3000 + 12 + 2
    monkeypatch.setattr("pyro_bmr.estimators.columns._MOST_ALIKE", 100)
    inclusion = np.zeros(3000)
    inclusion[[1500, 2900]] = 0.5
    assert alike(x, groups, inclusion) == [[0, 10, 1500, 2900]]
    some = alike_names([list("abcdefg"), *[list("ab")] * 6])
    assert some == "a, b, c, d, e and 2 more; a, b; a, b; a, b; a, b; 2 more groups"


def test_a_chain_of_columns_is_one_group():
    angles = np.linspace(0, 1, 12)  # cos of a step is 0.996, of the ends 0.54
    waves = np.linspace(0, 2 * np.pi, 50, endpoint=False)
    x = np.cos(waves[:, None] + angles)
    groups = [np.array([k]) for k in range(12)]
    assert alike(x, groups, np.zeros(12)) == [list(range(12))]
    assert alike(x[:, ::2], groups[:6], np.zeros(6)) == []


def test_objects_that_are_numbers_and_texts_that_look_like_them():
    """Decimals and numbers with gaps among objects are numbers; the last are a hint."""
    frame, y = table()
    gaps = frame["noise"].astype(object).where(frame.index != 3, None)
    exact = [Decimal(str(value)) for value in frame["noise"][::-1]]
    frame = frame.drop(columns="noise")
    found = small().fit(frame.assign(gaps=gaps, exact=exact), y)
    assert {"gaps", "gaps missing", "exact"} <= set(found.coefficient_names_)
    with pytest.warns(bmr.errors.PyroBMRWarning, match="numbers with commas: take those out"):
        small().fit(frame.assign(paid=[f"{1000 + k:,}" for k in range(80)]), y)
    with pytest.warns(bmr.errors.PyroBMRWarning, match="with decimal commas: make them points"):
        small().fit(frame.assign(paid=[f"{k},5" for k in range(80)]), y)


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
def test_the_inclusion_of_a_horseshoe_is_no_selection():
    """Among few columns, P(κ < 1/2) of noise is above 1/2; the figure says what it is."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((100, 5))
    y = 2 * x[:, 0] - x[:, 1] + rng.standard_normal(100)
    shrunk, search = (bmr.SparseRegressor(prior=p).fit(x, y) for p in ("horseshoe", "gaussian"))
    assert shrunk.kept_.tolist() == search.kept_.tolist() == [True, True, False, False, False]
    assert shrunk.inclusion_[2:].min() > 0.5 > search.inclusion_[2:].max()
    assert [model.plot().axes[1].get_xlabel() for model in (shrunk, search)] == [
        "P(κ < ½)",
        "probability",
    ]


@pytest.mark.parametrize("ask", ["predict", "predict_interval", "summary"])
def test_before_the_fit(ask):
    frame, _ = table()
    with pytest.raises(NotFittedError):
        getattr(small(), ask)(*([] if ask == "summary" else [frame]))


@pytest.mark.slow
def test_exposure_has_no_coefficient():
    frame, _ = table(150, 8)
    rng = np.random.default_rng(9)
    frame = frame.assign(years=rng.uniform(0.2, 8, 150))
    y = rng.poisson(frame["years"] * np.exp(0.5 + 0.08 * (frame["age"] - 50)))
    for family in (bmr.Poisson(exposure="years"), bmr.NegativeBinomial(exposure=-1)):
        model = small(family=family).fit(frame, y)
        names = np.array(model.coefficient_names_)
        assert "years" not in names and list(names[model.kept_]) == ["age"]
        assert model.coef_[0] == pytest.approx(0.08, abs=0.01)
        twice = frame.assign(years=2 * frame["years"])
        np.testing.assert_allclose(model.predict(twice), 2 * model.predict(frame))
        low, high = model.predict_interval(frame).T
        assert 0.87 < ((low <= y) & (y <= high)).mean() < 1
    array = frame[["age", "noise", "years"]].to_numpy()
    model = small(family=bmr.Poisson(exposure=2)).fit(array, y)
    assert model.coefficient_names_ == ["x0", "x1"] and model.n_features_in_ == 3


@pytest.mark.slow  # Student-t is in the fast tests of the engines
def test_outliers_count_little():
    frame, y = table(120, 10)
    y[::15] += 40.0
    model = small(family="student-t").fit(frame, y)
    assert model.summary().loc["age", "mean"] == pytest.approx(0.4, abs=0.03)
    assert model.family_.df < 3 and 0.4 < model.family_.scale * model.target_scale_ < 1.5
    again = small(family="student-t").fit(frame, 1e4 * y - 7)
    np.testing.assert_allclose(again.coef_ / 1e4, model.coef_, rtol=1e-6, atol=1e-12)
    given = small(family=bmr.likelihoods.StudentT(4.0, noise=0.7)).fit(frame, y)
    assert given.family_.df == 4.0
    assert given.family_.scale * given.target_scale_ == pytest.approx(0.7)
    mean, sd = given.predict(frame, return_std=True)
    assert (sd**2 > 0.49 * 2).all() and abs(mean.mean() - np.median(y)) < 1


def test_a_known_noise():
    frame, y = table()
    model = small(family=bmr.Normal(noise=3.0)).fit(frame, y)
    _, sd = model.predict(frame, return_std=True)
    assert 3.0 < sd.min() < sd.max() < 3.7
    x = (frame["age"] - frame["age"].mean()).to_numpy()
    exact = 3.0 / np.sqrt((x**2).sum())
    assert model.coef_draws_[:, 0].std() == pytest.approx(exact, rel=0.15)


def test_classes_in_an_order():
    frame, _ = table(300, 11)
    noise = np.random.default_rng(12).logistic(size=300)
    eta = 0.2 * (frame["age"] - 50) + noise
    names = ["low", "middle", "high", "top"]
    y = pd.Series(pd.Categorical.from_codes(np.digitize(eta, [-1, 0.5, 2.5]), names, ordered=True))
    model = small(bmr.SparseClassifier, family="ordinal").fit(frame, y)
    assert list(model.classes_) == names
    row = model.summary().loc["age"]
    assert row["mean"] == pytest.approx(0.2, abs=0.05) and row["inclusion"] > 0.99
    np.testing.assert_allclose(model.family_.gaps, [1.5, 2.0], rtol=0.3)
    probability = model.predict_proba(frame)
    np.testing.assert_allclose(
        probability.mean(0), y.value_counts(normalize=True)[names], atol=0.02
    )
    older = model.predict_proba(frame.assign(age=frame["age"] + 5))
    assert (older[:, 3] > probability[:, 3]).all() and (older[:, 0] < probability[:, 0]).all()
    assert model.score(frame, y) > 0.4
    plain = small(bmr.SparseClassifier, family="ordinal").fit(frame, np.digitize(eta, [-1, 0.5]))
    assert list(plain.classes_) == [0, 1, 2]


@pytest.mark.slow
def test_pictures():
    frame, y = table()
    model = small().fit(frame, y)
    assert len(model.plot().axes) == 2 and len(model.plot(frame, y).axes) == 3
    labels = np.where(y > y.mean(), "high", "low")
    assert len(small(bmr.SparseClassifier).fit(frame, labels).plot(frame, labels).axes) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (estimator, options)
        for estimator in (bmr.SparseRegressor, bmr.SparseClassifier)
        for options in (
            {},
            {"prior": "gaussian"},
            {"engine": "mean-field"},
            {"prior": "horseshoe"},
            {"family": "student-t" if estimator is bmr.SparseRegressor else "ordinal"},
        )
    ],
)
def test_scikit_learn_accepts_the_estimator(estimator, options):
    from sklearn.utils.estimator_checks import check_estimator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(
            estimator(steps=20, draws=50, **options), on_skip=None, on_fail=None
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


@pytest.mark.parametrize(
    "as_column", [lambda a: a, lambda a: a.astype(object)], ids=["int", "object"]
)
def test_whole_numbers_that_floats_cannot_tell_apart_are_refused(as_column):
    """They were a constant column, or steps of 2."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"b": rng.normal(size=40)})
    y = 2 * frame["b"] + 0.1 * rng.normal(size=40)
    frame["id"] = as_column(2**53 + rng.integers(0, 2, 40))
    with pytest.raises(TableError, match=r"column 'id': .* 2 values 1 are left; subtract"):
        bmr.SparseRegressor().fit(frame, y)
    whole = np.stack([rng.integers(0, 9, 40), 2**53 + rng.integers(0, 2, 40)], 1)
    with pytest.raises(TableError, match=r"column 'x1': .* 2 values 1 are left; subtract"):
        bmr.SparseRegressor().fit(whole, y)
    frame["id"] = as_column(2**60 + 2**10 * rng.integers(0, 9, 40))  # exact as floats
    assert "id" in bmr.SparseRegressor().fit(frame, y).summary().index


@pytest.mark.parametrize("number", [10**400, -(10**400), Fraction(10**400, 3)])
def test_numbers_beyond_the_largest_float_are_infinite(number):
    """float() of them raises an OverflowError."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"b": rng.normal(size=40)})
    large = frame.assign(a=pd.Series([number, *range(39)], dtype=object))
    with pytest.raises(TableError, match="column 'a': expected finite numbers, got infinity"):
        bmr.SparseRegressor().fit(large, frame["b"])
    known = bmr.SparseRegressor().fit(frame.assign(a=range(40)), frame["b"])
    with pytest.raises(TableError, match="column 'a': expected finite numbers, got infinity"):
        known.predict(large[["b", "a"]])
