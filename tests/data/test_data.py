"""Named data sets and the user's own files: values, shapes and moments; bad input names the thing
and the mend.
"""

import gzip
import hashlib
import os
import pickle
import random
import struct
import threading
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits

import pyro_bmr as bmr
from pyro_bmr.data import named as library
from pyro_bmr.data.csv_file import csv_table
from pyro_bmr.data.data_set import split_of
from pyro_bmr.data.named import sources
from pyro_bmr.data.readers import read_idx

IDX = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
SPLITS = ("x_train", "y_train", "x_test", "y_test")


def rows(x):
    return {row.tobytes() for row in x.flatten(1).numpy()}


def same(a, b):
    return all(torch.equal(getattr(a, key), getattr(b, key)) for key in SPLITS)


def installed(name):
    if not sources()[name].installed():
        pytest.skip(f"{name} is not installed; install it with: {sources()[name].install}")
    return bmr.load(name)


def arrays(**changes):
    rng = np.random.default_rng(5)
    made = {
        "x_train": rng.normal(2.0, 3.0, (30, 4)),
        "y_train": np.arange(30) % 3,
        "x_test": rng.normal(2.0, 3.0, (9, 4)),
        "y_test": np.arange(9) % 3,
    } | changes
    return {key: value for key, value in made.items() if value is not None}


@pytest.fixture
def npz(tmp_path):
    def write(name="mine.npz", **changes):
        np.savez(tmp_path / name, **arrays(**changes))
        return tmp_path / name

    return write


def idx_bytes(array):
    return (
        b"\x00\x00\x08"
        + bytes([array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def idx_folder(folder, zipped=(), seed=0):
    rng = np.random.default_rng(seed)
    made = {
        "x_train": rng.integers(0, 256, (12, 5, 4)),
        "y_train": np.arange(12) % 4,
        "x_test": rng.integers(0, 256, (6, 5, 4)),
        "y_test": np.array([3, 0, 2, 1, 1, 3]),
    }
    folder.mkdir(parents=True)
    for key, stem in IDX.items():
        if key in zipped:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(idx_bytes(made[key])))
        else:
            (folder / stem).write_bytes(idx_bytes(made[key]))
    return made


class Bomb:
    """Makes the folder `marker` when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_digits():
    data = bmr.load("digits")
    raw = load_digits()
    assert (data.x_train.shape, data.x_test.shape) == ((1438, 1, 8, 8), (359, 1, 8, 8))
    assert (data.y_train.shape, data.y_test.shape) == ((1438,), (359,))
    assert {data.x_train.dtype, data.x_test.dtype} == {torch.float32} and {
        data.y_train.dtype,
        data.y_test.dtype,
    } == {torch.int64}
    assert (data.task, data.classes, data.outputs, data.name) == (
        "classification",
        10,
        10,
        "digits",
    )
    assert isinstance(data.likelihood(), bmr.Categorical)
    assert (
        abs(float(data.x_train.double().mean())) < 1e-5
        and abs(float(data.x_train.double().std(correction=0)) - 1) < 1e-5
    )
    both = torch.cat([data.x_train, data.x_test])
    pixels = ((both - both.min()) * 16 / (both.max() - both.min())).flatten(1).round().int().numpy()
    got = np.concatenate([pixels, torch.cat([data.y_train, data.y_test])[:, None].int().numpy()], 1)
    want = np.concatenate([raw.data.astype(np.int32), raw.target[:, None].astype(np.int32)], 1)
    assert (
        np.array_equal(np.unique(got, axis=0), np.unique(want, axis=0))
        and len(np.unique(want, axis=0)) == 1797
    )


def test_diabetes():
    data = bmr.load("diabetes")
    raw = load_diabetes()
    assert (data.x_train.shape, data.x_test.shape, data.y_train.shape, data.y_test.shape) == (
        (354, 10),
        (88, 10),
        (354,),
        (88,),
    )
    assert {getattr(data, key).dtype for key in SPLITS} == {torch.float32}
    assert (data.task, data.classes, data.outputs) == ("regression", None, 1) and isinstance(
        data.likelihood(), bmr.Normal
    )
    for part in (data.x_train, data.y_train):
        assert (
            part.double().mean(0).abs().max() < 1e-5
            and (part.double().std(0, correction=0) - 1).abs().max() < 1e-5
        )
    targets = torch.cat([data.y_train, data.y_test]).double() * data.target_scale + data.target_mean
    assert np.allclose(np.sort(targets.numpy()), np.sort(raw.target), rtol=0, atol=1e-3)
    assert float(data.x_test.mean(0).abs().max()) > 1e-3, (
        "the test rows are standardised by the training rows' moments, not their own"
    )
    assert data.target_scale == pytest.approx(
        float((data.y_train.double() * data.target_scale).std(correction=0)), rel=1e-5
    )


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_split_is_deterministic_and_disjoint(name):
    first = bmr.load(name)
    np.random.seed(3)
    torch.manual_seed(3)
    assert same(first, bmr.load(name))
    assert not rows(first.x_train) & rows(first.x_test)
    assert len(rows(first.x_train)) == len(first.x_train) and len(rows(first.x_test)) == len(
        first.x_test
    )


@pytest.mark.slow  # 70,000 images; files of the same form are read above
def test_fashion_mnist():
    data = installed("fashion-mnist")
    assert (data.x_train.shape, data.x_test.shape, data.classes) == (
        (60_000, 1, 28, 28),
        (10_000, 1, 28, 28),
        10,
    )
    assert (
        data.y_train.bincount().tolist() == [6000] * 10
        and data.y_test.bincount().tolist() == [1000] * 10
    )
    assert data.y_train[:5].tolist() == [9, 0, 0, 3, 0] and data.y_test[:5].tolist() == [
        9,
        2,
        1,
        1,
        6,
    ]
    assert abs(float(data.x_train.mean())) < 1e-3 and abs(float(data.x_train.std()) - 1) < 1e-3
    assert data.x_train.dtype == torch.float32 and data.y_train.dtype == torch.int64


def test_mnist():
    data = installed("mnist")
    assert (data.x_train.shape, data.x_test.shape, data.classes) == (
        (60_000, 1, 28, 28),
        (10_000, 1, 28, 28),
        10,
    )
    assert data.y_train[:5].tolist() == [5, 0, 4, 1, 9] and data.y_test[:5].tolist() == [
        7,
        2,
        1,
        0,
        4,
    ]
    assert abs(float(data.x_train.mean())) < 1e-3 and abs(float(data.x_train.std()) - 1) < 1e-3


@pytest.mark.slow  # it makes the whole set
def test_mnist_1d_leaves_the_global_random_states():
    np.random.seed(11)
    random.seed(11)
    before = np.random.get_state(), random.getstate()
    data = installed("mnist-1d")
    after = np.random.get_state(), random.getstate()
    assert (
        np.array_equal(before[0][1], after[0][1])
        and before[0][2:] == after[0][2:]
        and before[1] == after[1]
    )
    assert (data.x_train.shape, data.x_test.shape, data.classes) == ((4000, 40), (1000, 40), 10)
    assert (
        data.x_train.mean(0).abs().max() < 1e-4
        and (data.x_train.std(0, correction=0) - 1).abs().max() < 1e-4
    )
    assert data.y_train.dtype == torch.int64 and data.y_train.bincount().min() > 300


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_a_set_that_is_not_installed_names_the_command(name, monkeypatch):
    monkeypatch.setattr(library, "_folder", lambda name: None)
    with pytest.raises(bmr.errors.DataError, match=name) as error:
        bmr.load(name)
    assert sources()[name].install in str(error.value) and not sources()[name].installed()


def test_mnist_1d_not_installed(monkeypatch):
    monkeypatch.setattr(library, "_has_mnist_1d", lambda: False)
    with pytest.raises(bmr.errors.DataError, match=r"mnist-1d.*pip install mnist1d"):
        bmr.load("mnist-1d")


def test_an_altered_named_set_is_refused(tmp_path, monkeypatch):
    idx_folder(tmp_path / "mnist")
    monkeypatch.setattr(library, "_HOME", tmp_path)
    with pytest.raises(
        bmr.errors.DataError, match=r"train-images-idx3-ubyte.*differ.*install it again"
    ):
        bmr.load("mnist")


def test_npz_of_images(npz):
    rng = np.random.default_rng(0)
    x_train, x_test = (
        rng.integers(0, 256, (20, 6, 5), dtype=np.uint8),
        rng.integers(0, 256, (8, 6, 5), dtype=np.uint8),
    )
    y_train, y_test = np.arange(20, dtype=np.int16) % 4, np.arange(8, dtype=np.uint8) % 4
    data = bmr.load(npz(x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test))
    assert (data.x_train.shape, data.x_test.shape, data.classes, data.name) == (
        (20, 1, 6, 5),
        (8, 1, 6, 5),
        4,
        "mine",
    )
    mean, sd = x_train.astype(float).mean(), x_train.astype(float).std()
    assert np.allclose(data.x_train[:, 0], (x_train - mean) / sd, atol=1e-5) and np.allclose(
        data.x_test[:, 0], (x_test - mean) / sd, atol=1e-5
    )
    assert (
        data.y_train.dtype == torch.int64
        and data.y_train.tolist() == y_train.tolist()
        and data.y_test.tolist() == y_test.tolist()
    )


def test_npz_of_channels_keeps_its_shape(npz):
    rng = np.random.default_rng(0)
    data = bmr.load(
        npz(x_train=rng.normal(size=(30, 3, 4, 5)), x_test=rng.normal(size=(9, 3, 4, 5)))
    )
    assert data.x_train.shape == (30, 3, 4, 5) and data.x_test.shape == (9, 3, 4, 5)


@pytest.mark.parametrize("column", [False, True])
def test_npz_of_real_targets(npz, column):
    rng = np.random.default_rng(1)
    x_train, x_test = rng.normal(4, [1, 2, 3], (25, 3)), rng.normal(4, [1, 2, 3], (7, 3))
    y_train, y_test = rng.normal(50, 8, 25), rng.normal(50, 8, 7)
    shape = (-1, 1) if column else (-1,)
    data = bmr.load(
        npz(
            x_train=x_train,
            y_train=y_train.reshape(shape),
            x_test=x_test,
            y_test=y_test.reshape(shape),
        )
    )
    assert (data.task, data.classes, data.y_train.shape, data.y_train.dtype) == (
        "regression",
        None,
        (25,),
        torch.float32,
    )
    assert data.target_mean == pytest.approx(
        y_train.mean(), rel=1e-6
    ) and data.target_scale == pytest.approx(y_train.std(), rel=1e-5)
    assert np.allclose(data.x_test, (x_test - x_train.mean(0)) / x_train.std(0), atol=1e-5)
    assert np.allclose(data.y_test, (y_test - y_train.mean()) / y_train.std(), atol=1e-5)


def test_one_test_row(npz):
    data = bmr.load(npz(x_test=np.ones((1, 4)), y_test=np.array([2])))
    assert data.x_test.shape == (1, 4) and data.y_test.tolist() == [2]


@pytest.mark.parametrize("value", [0.1, 7.0, 1e6 / 3])
def test_constant_columns_are_only_centred(npz, value):
    x_train, x_test = np.random.default_rng(2).normal(size=(37, 3)), np.zeros((5, 3))
    x_train[:, 1], x_test[:, 1] = value, value + 0.5
    data = bmr.load(
        npz(x_train=x_train, y_train=np.arange(37) % 3, x_test=x_test, y_test=np.arange(5) % 3)
    )
    assert float(data.x_train[:, 1].abs().max()) < 1e-6 and data.x_test[
        :, 1
    ].tolist() == pytest.approx([0.5] * 5, abs=1e-6)


def test_a_large_offset_does_not_cost_the_digits(npz):
    x, y = np.random.default_rng(2).normal(size=(30, 4)), np.random.default_rng(3).normal(size=30)
    data = bmr.load(npz(x_train=1e9 + x, y_train=1e9 + y, x_test=1e9 + x[:9], y_test=1e9 + y[:9]))
    assert np.allclose(data.x_train, (x - x.mean(0)) / x.std(0), atol=1e-4)
    assert np.allclose(data.y_train, (y - y.mean()) / y.std(), atol=1e-4)


def table(n=40):
    rng = np.random.default_rng(4)
    made = pd.DataFrame(
        {
            "height": rng.normal(170, 10, n),
            "age": rng.integers(20, 60, n),
            "price": rng.normal(9, 2, n),
        }
    )
    return made.assign(price=made["price"] + 0.1 * made["height"], grade=np.arange(n) % 3)


def test_csv_regression(tmp_path):
    made = table()
    made.to_csv(tmp_path / "houses.csv", index=False)
    data = bmr.load(tmp_path / "houses.csv", "price")
    assert (data.task, data.name, data.x_train.shape, data.x_test.shape) == (
        "regression",
        "houses",
        (32, 3),
        (8, 3),
    )
    assert same(data, bmr.load(str(tmp_path / "houses.csv"), target="price"))
    prices = (
        torch.cat([data.y_train, data.y_test]).double().numpy() * data.target_scale
        + data.target_mean
    )
    assert np.allclose(np.sort(prices), np.sort(made["price"]), atol=1e-4)
    heights = torch.cat([data.x_train, data.x_test])[:, 0].double().numpy()
    assert np.corrcoef(heights[np.argsort(prices)], made.sort_values("price")["height"])[
        0, 1
    ] == pytest.approx(1, abs=1e-6)


def test_csv_classes(tmp_path):
    table().to_csv(tmp_path / "houses.csv", index=False)
    data = bmr.load(tmp_path / "houses.csv", "grade")
    assert (data.task, data.classes, data.y_train.dtype, data.x_train.shape) == (
        "classification",
        3,
        torch.int64,
        (32, 3),
    )
    assert torch.cat([data.y_train, data.y_test]).bincount().tolist() == [14, 13, 13]


def test_csv_with_texts_and_gaps(tmp_path):
    """One column for each text; gaps have the median of the training rows and a mark."""
    rng = np.random.default_rng(3)
    n = 40
    made = table(n).drop(columns="grade")
    made["city"] = rng.choice(["Ulm", "Bonn", "Kiel"], n)
    made["kind"] = np.where(rng.random(n) < 0.3, None, "flat")
    made.loc[rng.random(n) < 0.25, "age"] = np.nan
    made["bought"] = np.where(made["price"] > made["price"].median(), "yes", "no")
    made.drop(columns="price").to_csv(tmp_path / "houses.csv", index=False)
    data = bmr.load(tmp_path / "houses.csv", "bought")
    train, test = split_of(n)
    assert sorted([*train, *test]) == list(range(n)) and len(test) == 8
    assert data.classes == 2
    assert data.y_test.tolist() == (made["bought"].iloc[test] == "yes").astype(int).tolist()
    median = made["age"].iloc[train].median()
    columns = [
        made["height"],
        made["age"].fillna(median),
        made["age"].isna(),
        *(made["city"] == name for name in ("Bonn", "Kiel", "Ulm")),
        *(made["kind"].fillna("missing") == name for name in ("flat", "missing")),
    ]
    raw = np.stack([column.to_numpy(dtype=np.float64) for column in columns], 1)
    expected = (raw - raw[train].mean(0)) / raw[train].std(0)
    assert np.allclose(data.x_train.numpy(), expected[train], atol=1e-5)
    assert np.allclose(data.x_test.numpy(), expected[test], atol=1e-5)


def test_a_text_of_the_test_rows_alone_is_said(tmp_path):
    made = table(40).drop(columns="grade")
    made["city"] = "Ulm"
    made.loc[made.index % 2 == 0, "city"] = "Bonn"
    made.loc[split_of(40)[1][0], "city"] = "Kiel"
    made.to_csv(tmp_path / "houses.csv", index=False)
    with pytest.warns(bmr.PyroBMRWarning, match="'city': 1 categories .* 'Kiel'"):
        data = bmr.load(tmp_path / "houses.csv", "price")
    assert data.x_test.shape == (8, 4)


def test_csv_of_few_rows(tmp_path):
    table(6).to_csv(tmp_path / "few.csv", index=False)
    data = bmr.load(tmp_path / "few.csv", "price")
    assert data.y_train.shape == (5,) and data.y_test.shape == (1,)


@pytest.mark.parametrize("zipped", [(), tuple(IDX), ("x_train",)])
def test_folder_of_idx_files(tmp_path, zipped):
    made = idx_folder(tmp_path / "letters", zipped)
    data = bmr.load(tmp_path / "letters")
    assert (data.name, data.classes, data.x_train.shape, data.x_test.shape) == (
        "letters",
        4,
        (12, 1, 5, 4),
        (6, 1, 5, 4),
    )
    assert (
        data.y_train.tolist() == made["y_train"].tolist()
        and data.y_test.tolist() == made["y_test"].tolist()
    )
    want = (made["x_test"] - made["x_train"].mean()) / made["x_train"].std()
    assert np.allclose(data.x_test[:, 0], want, atol=1e-5)


def test_a_users_folder_may_have_any_name(tmp_path):
    made = idx_folder(tmp_path / "mnist")
    assert bmr.load(tmp_path / "mnist").y_test.tolist() == made["y_test"].tolist()


def test_folder_without_a_file(tmp_path):
    idx_folder(tmp_path / "letters")
    (tmp_path / "letters" / IDX["y_test"]).unlink()
    with pytest.raises(bmr.errors.DataError, match=r"letters.*t10k-labels-idx1-ubyte"):
        bmr.load(tmp_path / "letters")


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 5)])
def test_read_idx(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape)
    (tmp_path / "plain").write_bytes(idx_bytes(array))
    (tmp_path / "zipped.gz").write_bytes(gzip.compress(idx_bytes(array)))
    for name in ("plain", "zipped.gz"):
        got = read_idx(tmp_path / name)
        assert got.dtype == np.uint8 and np.array_equal(got, array)


def test_read_idx_checks_the_hash(tmp_path):
    raw = idx_bytes(np.arange(12).reshape(3, 4))
    (tmp_path / "a.gz").write_bytes(gzip.compress(raw))
    assert read_idx(tmp_path / "a.gz", hashlib.sha256(raw).hexdigest()).sum() == 66
    with pytest.raises(bmr.errors.DataError, match=r"a\.gz.*differ.*abcabc.*install it again"):
        read_idx(tmp_path / "a.gz", "abc" * 21 + "a")


GOOD = idx_bytes(np.arange(200).reshape(10, 20))
BAD_IDX = {
    "truncated": (GOOD[:-3], "10 × 20.*197.*truncated"),
    "too long": (GOOD + b"\x00", "10 × 20.*201"),
    "short header": (GOOD[:7], "expected an IDX file.*got one that begins with"),
    "a length of 0 beside huge ones": (
        b"\x00\x00\x08\x04" + struct.pack(">4I", 0, 2**32 - 1, 2**32 - 1, 7),
        "0 × 4294967295 × 4294967295 × 7 cannot be held",
    ),
    "more axes than an array has": (
        b"\x00\x00\x08\x64" + struct.pack(">100I", *[1] * 100) + b"\x07",
        "cannot be held",
    ),
    "empty": (b"", "expected an IDX file.*got one that begins with nothing"),
    "wrong magic": (
        b"\x00\x00\x0d" + GOOD[3:],
        "expected an IDX file.*got one that begins with 00000d02",
    ),
    "text": (b"<!DOCTYPE html>", "expected an IDX file.*got one that begins with"),
    "truncated gzip": (gzip.compress(GOOD)[:40], "not readable"),
    "damaged gzip": (gzip.compress(GOOD)[:10] + b"\xff" * 40, "not readable"),
    "wrong checksum": (gzip.compress(GOOD)[:-8] + bytes(8), "not readable"),
}


@pytest.mark.parametrize(("raw", "message"), BAD_IDX.values(), ids=BAD_IDX)
def test_bad_idx(tmp_path, raw, message):
    (tmp_path / "bad-idx").write_bytes(raw)
    with pytest.raises(bmr.errors.DataError, match=rf"bad-idx.*{message}.*install it again"):
        read_idx(tmp_path / "bad-idx")


def test_unknown_name():
    with pytest.raises(
        bmr.errors.DataError,
        match=r"'nope'.*digits, diabetes, fashion-mnist, mnist, mnist-1d.*\.npz, \.csv",
    ):
        bmr.load("nope")


def test_unknown_suffix(tmp_path):
    (tmp_path / "mine.txt").write_text("1 2 3")
    with pytest.raises(bmr.errors.DataError, match=r"mine\.txt.*\.npz, \.csv.*'\.txt'"):
        bmr.load(tmp_path / "mine.txt")


def hole(array, value=np.nan):
    array = np.array(array, dtype=float)
    array[(4, *(0,) * (array.ndim - 1))] = value
    return array


FULL = arrays()
BAD_NPZ = {
    "no x_test": ({"x_test": None}, "no x_test.*found: x_train, y_train, y_test"),
    "no y": ({"y_train": None, "y_test": None}, "no y_train and no y_test"),
    "NaN in x_train": (
        {"x_train": hole(FULL["x_train"])},
        "training rows.*x is NaN.*row 4.*drop or impute",
    ),
    "infinity in x_test": (
        {"x_test": hole(FULL["x_test"], np.inf)},
        "test rows.*x is NaN or infinite.*row 4",
    ),
    "NaN in y": ({"y_train": hole(FULL["y_train"])}, "training rows.*y is NaN.*row 4"),
    "negative label": ({"y_train": FULL["y_train"] - 1}, "training label -1.*labels run from 0"),
    "negative test label": ({"y_test": FULL["y_test"] - 1}, "test label -1.*labels run from 0"),
    "label never seen": ({"y_test": FULL["y_test"] + 1}, "test label 3.*largest training label, 2"),
    "one class": (
        {"y_train": 0 * FULL["y_train"], "y_test": 0 * FULL["y_test"]},
        "at least two classes.*got one",
    ),
    "constant target": (
        {"y_train": np.full(30, 4.0), "y_test": np.full(9, 4.0)},
        r"constant \(4\)",
    ),
    "constant odd target": (
        {"y_train": np.full(30, 0.1), "y_test": np.full(9, 0.1)},
        r"constant \(0\.1\)",
    ),
    "other rows": (
        {"y_train": np.arange(29) % 3},
        r"training rows.*same number of rows.*\(30, 4\).*\(29,\)",
    ),
    "other columns": (
        {"x_test": np.ones((9, 5))},
        r"x_train and x_test of shape.*got \(30, 4\) and \(9, 5\)",
    ),
    "no rows": ({"x_test": np.ones((0, 4)), "y_test": np.ones(0, int)}, "test rows.*at least one"),
    "flat x": ({"x_train": np.ones(30), "x_test": np.ones(9)}, r"\(rows, \.\.\.\)"),
    "wide y": (
        {"y_train": np.ones((30, 2)), "y_test": np.ones((9, 2))},
        r"one number per row, got shape \(30, 2\)",
    ),
    "text": ({"y_train": np.array(["cat", "dog"] * 15)}, "y_train: expected numbers, got type <U3"),
    "complex": (
        {"x_train": FULL["x_train"] + 1j},
        "x_train: expected numbers, got type complex128",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_NPZ.values(), ids=BAD_NPZ)
def test_bad_npz(npz, changes, message):
    with pytest.raises(bmr.errors.DataError, match=rf"mine.*{message}"):
        bmr.load(npz(**changes))


def test_object_arrays_are_not_unpickled(npz, tmp_path):
    bomb = np.empty(30, dtype=object)
    bomb[:] = [Bomb(tmp_path / "marker")] + [0] * 29
    path = npz(y_train=bomb)
    with pytest.raises(bmr.errors.DataError, match=r"mine\.npz.*pickle"):
        bmr.load(path)
    assert not (tmp_path / "marker").exists()
    with np.load(path, allow_pickle=True) as file, pytest.raises(TypeError):
        file["y_train"].sum()
    assert (tmp_path / "marker").exists(), "the file does hold a pickle that acts"


def test_a_pickle_named_npz_is_not_unpickled(tmp_path):
    (tmp_path / "mine.npz").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    with pytest.raises(bmr.errors.DataError, match=r"mine\.npz.*not a readable \.npz file"):
        bmr.load(tmp_path / "mine.npz")
    assert not (tmp_path / "marker").exists()


def single_array(path):
    with path.open("wb") as file:
        np.save(file, np.arange(6.0))


def text_members(path):
    with zipfile.ZipFile(path, "w") as file:
        for key in SPLITS:
            file.writestr(key, "1 2 3")


def truncated(path):
    np.savez(path, **FULL)
    path.write_bytes(path.read_bytes()[:-30])


def damaged(path):
    np.savez_compressed(path, **FULL)
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        start = file.infolist()[0].header_offset
    name, extra = struct.unpack("<HH", raw[start + 26 : start + 30])
    begin = start + 30 + name + extra
    raw[begin : begin + 40] = b"\xff" * 40
    path.write_bytes(bytes(raw))


WRONG_FILES = {
    "text": lambda path: path.write_text("x_train,y_train\n1,2\n"),
    "empty": lambda path: path.write_bytes(b""),
    "one array": single_array,
    "text members": text_members,
    "truncated": truncated,
    "damaged": damaged,
}


@pytest.mark.parametrize("write", WRONG_FILES.values(), ids=WRONG_FILES)
def test_files_that_are_no_npz(tmp_path, write):
    write(tmp_path / "mine.npz")
    with pytest.raises(bmr.errors.DataError, match=r"mine\.npz.*\.npz file"):
        bmr.load(tmp_path / "mine.npz")


BAD_CSV = {
    "without target": ("a,b\n" + "1,2\n" * 9, None, "--target; its columns are: a, b$"),
    "wrong target": ("a,b\n" + "1,2\n" * 9, "c", "--target; its columns are: a, b; got 'c'"),
    "names alone": (
        "name,b\n" + "".join(f"n{k},{k}.5\n" for k in range(9)),
        "b",
        "no column is left to predict from",
    ),
    "infinite": ("a,b\n" + "1,2.5\n2,1.5\n" * 5 + "inf,3.5\n", "b", "'a': expected finite numbers"),
    "target of texts": (
        "a,b\n" + "".join(f"{k},n{k}\n" for k in range(9)),
        "b",
        "'b': expected numbers or classes, got 9 different texts in 9 rows",
    ),
    "target missing": ("a,b\n" + "1,2.5\n2,1.5\n" * 5 + "3,\n", "b", "'b': .*got none in row 12"),
    "too few rows": ("a,b\n1,2.5\n2,3.5\n", "b", "at least 5 rows .*got 2 rows and 2 columns"),
    "header only": ("a,b\n", "b", "at least 5 rows .*got 0 rows"),
    "no feature": ("b\n" + "1.5\n2.5\n" * 5, "b", "one feature .*1 columns"),
    "ragged": ("a,b\n1,2\n1,2,3\n", "b", r"not a readable \.csv"),
    "empty": ("", "b", r"not a readable \.csv"),
}


@pytest.mark.filterwarnings("ignore:columns left out")
@pytest.mark.parametrize(("text", "target", "message"), BAD_CSV.values(), ids=BAD_CSV)
def test_bad_csv(tmp_path, text, target, message):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(bmr.errors.DataError, match=rf"mine.*{message}") as error:
        bmr.load(tmp_path / "mine.csv", target)
    assert "\n" not in str(error.value)


def test_weights_of_zero_are_no_data(tmp_path):
    (tmp_path / "mine.csv").write_text("a,w,b\n" + "1,0,2.5\n2,0,1.5\n" * 5)
    weighted = bmr.likelihoods.Weighted(bmr.Normal(), "w")
    with pytest.raises(bmr.errors.DataError, match="weights: expected a number > 0 in a row at"):
        bmr.load(tmp_path / "mine.csv", "b", likelihood=weighted)


def test_classes_that_are_one_number_as_a_float(tmp_path):
    """2⁵³ and 2⁵³ + 1 are two classes."""
    big = 2**53
    lines = [f"{k % 3},{big + (k % 4 > 1)}" for k in range(12)]
    (tmp_path / "mine.csv").write_text("a,b\n" + "\n".join(lines))
    data = bmr.load(tmp_path / "mine.csv", "b", likelihood="categorical")
    labels = torch.cat([data.y_train, data.y_test]).tolist()
    assert data.classes == 2 and sorted(labels) == [0] * 6 + [1] * 6


def test_targets_of_two_kinds(tmp_path):
    x, y = np.eye(6), np.arange(6) % 2
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y.astype(float))
    with pytest.raises(bmr.errors.DataError, match="one kind, .*got y_train int64, y_test float64"):
        bmr.load(tmp_path / "d.npz")


SEMICOLONS = "a;größe;b\n1,5;2,5;u\n" + "2,5;1,5;v\n" * 9
COMMAS = "a,größe,b\n" + "1,2,u\n" * 9
OTHER_CSV = {
    "semicolons": (SEMICOLONS, "utf-8", r"got ';' and decimals with a comma; .*sep=';', decimal="),
    "semicolons after a mark": (SEMICOLONS, "utf-8-sig", r"got ';' and decimals .*decimal=','\)"),
    "semicolons of Windows": (
        SEMICOLONS.replace("\n", "\r\n"),
        "cp1252",
        r"got ';' and.*decimal=',', encoding='cp1252'\)",
    ),
    "semicolons of other numbers": ("a;b;c\n1;2\n1;2;3\n", "utf-8", r"got ';'; .*sep=';'\)"),
    "commas in the header": ("size (cm, about);b\n1;2\n", "utf-8", r"got ';'; save"),
    "tabs": (COMMAS.replace(",", "\t"), "utf-8", r"got tabs; .*sep='\\t'\)"),
    "tabs, decimal commas": ("a\tb\n1,5\t2\n", "utf-8", r"got tabs and decimals with a comma"),
    "bars": (COMMAS.replace(",", "|"), "utf-8", r"got '\|'; "),
    "spaces": (COMMAS.replace(",", "  "), "utf-8", r"got spaces; "),
    "Latin-1": (COMMAS, "latin-1", r"in UTF-8, got the byte 0xf6 in line 1; save it as UTF-8"),
    "Latin-1 late": ("a,b\n" + "1,2\n" * 30_000 + "ö,2\n", "cp1252", "byte 0xf6 in line 30002"),
    "UTF-16": (COMMAS, "utf-16", "got UTF-16 or UTF-32; save it as UTF-8 with commas"),
    "UTF-16 without a mark": ("a,b\n1,2\n", "utf-16-le", "bytes of zero, as in UTF-16"),
    "a workbook": ("PK\3\4 and so on", "utf-8", "got an Excel or zip file"),
    "rows with a comma at the end": ("a,b\n" + "1,2,\n" * 9, "utf-8", "2 names and 3 fields"),
    "decimal commas": ("a,b\n" + "1,5,2,5\n" * 9, "utf-8", "2 names and 4 fields; .* a point"),
}


@pytest.mark.parametrize("case", OTHER_CSV)
def test_csv_written_otherwise_is_refused_with_the_mend(tmp_path, case):
    text, encoding, said = OTHER_CSV[case]
    (tmp_path / "mine.csv").write_bytes(text.encode(encoding))
    with pytest.raises(bmr.errors.DataError, match=rf"mine\.csv': expected .*{said}") as error:
        bmr.load(tmp_path / "mine.csv", "b")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (COMMAS, "utf-8-sig"),
        (COMMAS.replace("\n", "\r"), "utf-8"),
        ("PAR1,b\n" + "1,2\n" * 300, "utf-8"),
        ('a,"größe; cm, about","b\n"\n' + '1,2,"u;\nv"\n' * 9, "utf-8"),
        ("größe,b\n" + "é;é,2\n" * 20_000, "utf-8"),  # a letter may be cut at the end of the head
    ],
)
def test_csv_that_is_read(tmp_path, text, encoding):
    (tmp_path / "mine.csv").write_bytes(text.encode(encoding))
    table = csv_table(tmp_path / "mine.csv")
    names = ["größe", "b"] if len(text) > 10_000 else ["a", *table.columns[1:]]
    names = ["PAR1", "b"] if text.startswith("PAR1") else names
    assert table.columns.tolist() == names and table.notna().all(axis=None)


def test_csv_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    text = "a,b\n" + "1,2\n" * 40_000
    writer = threading.Thread(target=(tmp_path / "pipe.csv").write_text, args=(text,))
    writer.start()
    table = csv_table(tmp_path / "pipe.csv")
    writer.join()
    assert table.shape == (40_000, 2)


def test_csv_that_is_not_text(tmp_path):
    (tmp_path / "mine.csv").write_bytes(b"\xff\xfe\x00\x81\x99" * 20)
    with pytest.raises(bmr.errors.DataError, match=r"mine\.csv': expected text in UTF-8"):
        bmr.load(tmp_path / "mine.csv", "b")


def test_sources_begin_with_the_default():
    assert list(sources()) == ["digits", "diabetes", "fashion-mnist", "mnist", "mnist-1d"]
    assert all(
        source.about and bool(source.install) == (name not in ("digits", "diabetes"))
        for name, source in sources().items()
    )


def test_validation_rows_of_an_npz(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        f"{v}_{s}": rng.normal(3, 2, (n, 4)) if v == "x" else rng.integers(0, 3, n)
        for s, n in (("train", 30), ("test", 9), ("val", 7))
        for v in "xy"
    }
    np.savez(tmp_path / "d.npz", **arrays)
    data = bmr.load(tmp_path / "d.npz")
    x = arrays["x_train"]
    np.testing.assert_allclose(
        data.x_val, (arrays["x_val"] - x.mean(0)) / x.std(0), rtol=1e-4, atol=1e-5
    )
    assert data.y_val.tolist() == arrays["y_val"].tolist() and len(data.x_train) == 30
