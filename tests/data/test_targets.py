"""Targets under each likelihood: what `load` makes of the columns of a .csv file and the arrays of
a .npz file, and what it refuses.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.data.data_set import split_of
from pyro_bmr.likelihoods import StudentT, Weighted
from pyro_bmr.likelihoods.names import likelihood_from_name

ROWS = 60
TRAIN, TEST = split_of(ROWS)


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(4)
    hours = rng.uniform(0.5, 2.0, ROWS)
    made = pd.DataFrame({"a": rng.normal(3, 2, ROWS), "town": rng.choice(list("xyz"), ROWS)})
    made = made.assign(hours=hours, w=rng.uniform(0, 2, ROWS), visits=rng.poisson(7 * hours))
    made["size"], made["price"] = rng.normal(4, 3, ROWS), rng.normal(900, 250, ROWS)
    made["grade"], made["sick"], made["old"] = rng.integers([3, 0, 0], [7, 2, 2], (ROWS, 3)).T
    made.loc[::7, "price"] = None
    made["kind"] = made["town"].where(made.index % 5 > 0)
    return made


@pytest.fixture
def csv(table, tmp_path):
    table.to_csv(tmp_path / "visits.csv", index=False)
    return tmp_path / "visits.csv"


def test_counts_with_an_exposure_and_weights(csv, table):
    by_name = bmr.load(csv, "visits", "negative-binomial:exposure=hours,weights=w")
    given = Weighted(bmr.NegativeBinomial(exposure="hours"), weights="w")
    by_object = bmr.load(csv, "visits", given)
    assert by_name.family == by_object.family
    width = by_name.x_train.shape[1]
    assert by_name.family == Weighted(bmr.NegativeBinomial(exposure=width - 2), width - 1)
    assert by_name.task == "other" and by_name.outputs == 1 and by_name.input_shape == (width - 2,)
    # what the likelihood reads and counts are as they came, features are standardised
    read = by_name.x_train[:, -2:].double().numpy()
    np.testing.assert_allclose(read, table.loc[TRAIN, ["hours", "w"]].to_numpy(), rtol=1e-6)
    assert by_name.y_test.tolist() == table["visits"].to_numpy()[TEST].tolist()
    assert by_name.x_train[:, 0].mean().abs() < 1e-6
    assert torch.equal(by_name.seen(by_name.x_test), by_name.x_test[:, :-2])


def test_several_real_targets_have_units_of_their_own(csv, table):
    data = bmr.load(csv, "size,price", "normal:noise=per output,missing=ignore")
    columns = table.loc[TRAIN, ["size", "price"]]
    mean, scale = columns.mean().to_numpy(), columns.std(ddof=0).to_numpy()
    np.testing.assert_allclose(data.target_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(data.target_scale, scale, rtol=1e-6)
    back = data.y_train * data.target_scale + data.target_mean
    np.testing.assert_allclose(back, columns.to_numpy(), rtol=1e-5)
    assert data.y_train.isnan().sum() == columns["price"].isna().sum() > 3
    assert data.outputs == 2 and data.family.noise == "per output"


def test_a_noise_in_the_units_of_the_target_is_scaled_with_it(csv, table):
    data = bmr.load(csv, "size", StudentT(4, noise=0.7))
    scale = table.loc[TRAIN, "size"].std(ddof=0)
    assert data.family.df == 4 and data.family.noise == pytest.approx(0.7 / scale)
    with pytest.raises(bmr.errors.DataError, match="without a number for several targets"):
        bmr.load(csv, "size,price", "normal:noise=0.3,missing=ignore")


def test_grades_and_classes_are_numbered_in_their_order(csv, table):
    grades = bmr.load(csv, "grade", "ordinal")
    assert grades.family == bmr.Ordinal(4) and grades.outputs == 1 and grades.classes == 4
    assert grades.y_train.tolist() == (table["grade"].to_numpy()[TRAIN] - 3).tolist()
    kinds = bmr.load(csv, "kind", "categorical:missing=ignore")
    expected = table["kind"].map({"x": 0, "y": 1, "z": 2}).fillna(-100).to_numpy()[TEST]
    assert kinds.y_test.tolist() == expected.tolist() and kinds.outputs == 3
    labels = bmr.load(csv, ["sick", "old"], bmr.Bernoulli())
    assert labels.outputs == 2 and labels.y_train.dtype == torch.float32
    assert labels.y_test.tolist() == table[["sick", "old"]].to_numpy()[TEST].tolist()


def test_the_default_likelihood_by_name_changes_nothing(csv):
    plain, named = bmr.load(csv, "size"), bmr.load(csv, "size", "normal")
    assert named.family is None and named.task == "regression"
    assert torch.allclose(plain.y_train, named.y_train) and torch.equal(plain.x_test, named.x_test)
    assert bmr.load(csv, "town", "categorical").family is None
    smooth = bmr.load("digits", likelihood="categorical:label_smoothing=0.1")
    assert smooth.family == bmr.Categorical(label_smoothing=0.1)
    assert smooth.task == "classification" and smooth.outputs == 10
    noisy = bmr.load(csv, "size", "normal:noise=network")
    assert noisy.outputs == 2 and noisy.task == "other"


def test_arrays_of_a_file(tmp_path):
    rng = np.random.default_rng(6)
    x, time = rng.normal(5, 2, (30, 4)), rng.uniform(0.5, 2, (30, 1))
    arrays = {"x_train": np.hstack([time, x])[:20], "x_test": np.hstack([time, x])[20:]}
    y = rng.poisson(4 * time)
    np.savez(tmp_path / "a.npz", **arrays, y_train=y[:20], y_test=y[20:])
    data = bmr.load(tmp_path / "a.npz", likelihood=bmr.Poisson(exposure=0))
    np.testing.assert_allclose(data.x_test[:, 0], time[20:, 0], rtol=1e-6)
    assert data.input_shape == (4,) and data.y_train.dtype == torch.float32
    tokens = rng.integers(0, 3, (30, 6))
    tokens[:, 4:] = -100
    arrays = {"x_train": x[:20, None], "x_test": x[20:, None]}
    np.savez(tmp_path / "b.npz", **arrays, y_train=tokens[:20], y_test=tokens[20:])
    data = bmr.load(tmp_path / "b.npz", likelihood="categorical:ignore_index=-100")
    assert data.outputs == 3 and data.y_test.shape == (10, 6) and data.task == "other"


@pytest.mark.parametrize(
    ("target", "likelihood", "message"),
    [
        ("visits", "poison", "no likelihood 'poison'; the likelihoods are: normal, student-t"),
        ("visits", "poisson:exposure", "expected options as option=value.*got 'exposure'"),
        ("visits", "poisson:rate=3", "an option of exposure, missing, weights, got 'rate=3'"),
        ("visits", "poisson:exposure=days", "exposure: expected a column beside the target, of a"),
        ("visits", "poisson:exposure=town", "exposure: expected a number in every row of column"),
        ("visits", "poisson:exposure=size", "training rows: exposure: expected numbers > 0, got -"),
        ("size", "poisson", "expected whole numbers from 0 to 16,777,216, got .* in training row"),
        ("grade", "bernoulli", "expected 0 or 1, got [3-6] in training row"),
        ("price", "normal", "got none in row 2 of the file.*give the likelihood missing=ignore"),
        ("town", "ordinal", "expected numbers for the likelihood Ordinal, got texts"),
        ("size", "categorical", "expected numbers or classes, got 60 different numbers in 60 rows"),
        ("town", "bernoulli", "expected two different texts, got 3"),
        ("visits,hour", None, "name the column to predict.*got 'visits,hour'"),
        ("size,hours", None, "expected one number per row.*for several targets give a likelihood"),
        ("visits", bmr.Poisson, "load.*a name or a likelihood"),
    ],
)
def test_what_is_refused(csv, target, likelihood, message):
    with pytest.raises(bmr.PyroBMRError, match=message):
        bmr.load(csv, target, likelihood)


def test_named_sets_are_read_under_likelihoods_of_their_kind():
    with pytest.raises(bmr.errors.DataError, match="a likelihood of its classes, got Poisson"):
        bmr.load("digits", likelihood="poisson")
    with pytest.raises(bmr.errors.DataError, match="a likelihood of its reals, got Bernoulli"):
        bmr.load("diabetes", likelihood="bernoulli")
    assert isinstance(bmr.load("diabetes", likelihood="student-t").family, StudentT)


def test_names_have_the_arguments_of_their_class():
    assert likelihood_from_name("normal:noise=0.25") == bmr.Normal(noise=0.25)
    assert likelihood_from_name("ordinal:classes=5,missing=ignore") == bmr.Ordinal(
        5, ignore_index=-100
    )
    assert likelihood_from_name("categorical:class_axis=1").class_axis == 1
    with pytest.raises(bmr.errors.ModelError, match="the number of grades"):
        likelihood_from_name("ordinal")
    with pytest.raises(bmr.errors.ModelError, match="Normal.noise='mine'"):
        likelihood_from_name("normal:noise=mine")
    assert math.isclose(likelihood_from_name("student-t:df=4").df, 4)
