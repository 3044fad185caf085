"""Fits of data as people have them: loaders, data sets, iterables, arrays, tables, dicts."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_bmr as bmr
from tests.fitting.test_checkpoints import same, stopped

fit = partial(bmr.fit, epochs=2, progress=False)
loaded = partial(DataLoader, batch_size=32)
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(100, 4, generator=GENERATOR)
Y = (X @ torch.randn(4, 3, generator=GENERATOR)).argmax(1)


def classifier(**layers):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6), *layers.values(), nn.Tanh(), nn.Linear(6, 3))
    return bmr.BayesianNetwork(net, bmr.Gaussian(), bmr.Categorical())


class Own(Dataset):
    """Rows read one by one; with noise, an augmentation."""

    def __init__(self, x=X, y=Y, noise=0.0):
        self.x, self.y, self.noise = x, y, noise

    def __len__(self):
        return len(self.x)

    def __getitem__(self, number):
        return self.x[number] + self.noise * torch.randn(self.x.shape[1:]), self.y[number]


class Batches:
    """An iterable of batches without a length."""

    def __init__(self, size=32, x=X, y=Y):
        self.batches = list(zip(x.split(size), y.split(size), strict=True))

    def __iter__(self):
        return iter(self.batches)


@pytest.fixture(scope="module")
def of_tensors():
    return fit(classifier(), (X, Y), batch_size=32)


def mapped(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    return np.load(tmp_path / "x.npy", mmap_mode="r")


EQUAL = {
    "a loader over tensors": lambda path: loaded(TensorDataset(X, Y), shuffle=True),
    "a data set": lambda path: Own(),
    "a mapped file": lambda path: (mapped(path), Y.numpy()),
    "arrays": lambda path: (X.double().numpy(), Y.numpy()),
    "a table": lambda path: (pd.DataFrame(X.numpy()), pd.Series(Y.numpy(), dtype="Int64")),
}


@pytest.mark.parametrize("case", EQUAL)
def test_the_same_rows_in_another_form_give_the_same_bits(case, of_tensors, tmp_path):
    data = EQUAL[case](tmp_path)
    size = {} if isinstance(data, DataLoader) else {"batch_size": 32}
    assert same(of_tensors, fit(classifier(), data, **size))


def test_rows_in_order_and_held_out_give_the_same_bits():
    settings = {"batch_size": 32, "validation": 0.25, "shuffle": False, "epochs": 1}
    whole = fit(classifier(), (X, Y), **settings)
    fraction = np.float32(settings.pop("validation"))
    assert same(whole, fit(classifier(), Own(), validation=fraction, **settings))
    held = loaded(Own(X[75:], Y[75:]), batch_size=25)
    read = fit(classifier(), loaded(Own(X[:75], Y[:75])), validation=held, epochs=1)
    assert whole.history.equals(read.history)
    parts = fit(
        classifier(),
        (X[:75], Y[:75]),
        validation=loaded(Own(X[75:], Y[75:]), batch_size=10),
        epochs=1,
    )
    assert parts.history.validation_nll[0] < 3


def test_the_posterior_counts_the_rows_that_size_says():
    """Without a step, E[log p] is N/B times the log likelihood of the batches, averaged."""
    model, still = classifier(), partial(torch.optim.SGD, lr=0.0)
    log_p = -nn.functional.cross_entropy(model.net(X[:64]), Y[:64], reduction="sum").detach()
    of_rows = loaded(Stream(X[:64], Y[:64]))
    for size, data in ((64, Batches(x=X[:64], y=Y[:64])), (640, iter_forever(32)), (64, of_rows)):
        found = fit(model, data, size=size, guide=bmr.guides.Point, optimizer=still, epochs=1)
        first = found.history.expected_log_likelihood[0]
        assert first == pytest.approx(size / 64 * float(log_p), rel=1e-5)
        assert found.history.step[0] == -(-size // 32)


class Stream(IterableDataset):
    """Rows without numbers and without a length."""

    def __init__(self, x=X, y=Y):
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


def iter_forever(size):
    while True:
        yield X[:size], Y[:size]
        yield X[size : 2 * size], Y[size : 2 * size]


class Text(nn.Module):
    """As a Hugging Face model is called: net(input_ids=…, attention_mask=…)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.table, self.head = nn.Embedding(12, 5), nn.Linear(5, 2)

    def forward(self, input_ids, attention_mask):
        weight = attention_mask[..., None].to(self.table.weight.dtype)
        return self.head((self.table(input_ids).tanh() * weight).sum(1) / weight.sum(1))


def texts(count=100):
    """Texts of 3 to 6 words as a data set of dicts; words from 6 up are of class 1."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for k in range(count):
        length, label = 3 + k % 4, k % 2
        words = torch.randint(6, (length,), generator=generator) + 6 * label
        found.append({"input_ids": words, "labels": label})
    return found


def padded(rows):
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_batches_of_dicts_go_through_fit_reduce_predict_and_export():
    """Padded batch by batch, so that their lengths differ."""
    rows = texts()
    net = Text()
    model = bmr.BayesianNetwork(net, bmr.Gaussian(), bmr.Categorical())
    loader = loaded(rows, batch_size=10, shuffle=True, collate_fn=padded)
    result = fit(model, loader, epochs=5, optimizer=bmr.adam(0.1), validation=padded(rows[:9]))
    reduction = bmr.reduce(result.posterior, to=bmr.Gaussian(scale=0))
    assert reduction.kept < 1
    in_order = loaded(rows, batch_size=10, collate_fn=padded)
    prediction = bmr.predict(result.program, reduction.posterior, in_order)
    labels = torch.tensor([row["labels"] for row in rows])
    assert (prediction.probs.argmax(1) == labels).float().mean() > 0.95
    plain = bmr.export(result.program, reduction.posterior)
    batch = padded(rows)
    labels = batch.pop("labels")
    assert (plain(**batch).argmax(1) == labels).float().mean() > 0.95
    at_once = bmr.predict(result.program, reduction.posterior, batch)
    torch.testing.assert_close(at_once.probs, prediction.probs, rtol=0, atol=1e-5)


def test_a_fit_of_augmented_rows_is_a_function_of_its_seed():
    settings = {"reduce": bmr.Every(epochs=1, kept=0.5)}
    first, again, other = (
        fit(classifier(), loaded(Own(noise=0.1), shuffle=True), seed=seed, **settings)
        for seed in (0, 0, 1)
    )
    assert same(first, again)
    assert not torch.equal(first.posterior["0.weight"].mean, other.posterior["0.weight"].mean)
    assert first.history.kept.iloc[-1] < 1


CONTINUED = {
    "a loader": lambda: loaded(Own(noise=0.1), shuffle=True),
    "a data set": lambda: Own(noise=0.1),
    "batches in order": lambda: Batches(),
    "an iterator": lambda: iter_forever(32),
}


FAST = {("a loader", 2), ("a loader", 6), ("an iterator", 6)}


@pytest.mark.parametrize(
    ("case", "at"),
    [
        pytest.param(case, at, marks=() if (case, at) in FAST else pytest.mark.slow)
        for case in CONTINUED
        for at in (2, 6)
    ],
)
def test_a_fit_of_a_loader_continues_to_the_bit(case, at, tmp_path, monkeypatch):
    more = {"a loader": {}, "a data set": {"batch_size": 32}}.get(case, {"size": 100})

    def call(**settings):
        return fit(classifier(), CONTINUED[case](), **more, **settings)

    monkeypatch.setattr("pyro_bmr.files._sync", lambda path: None)
    whole = call()
    stopped(call, tmp_path / "fit", monkeypatch, at)
    torch.manual_seed(at)  # a process of its own
    assert same(whole, call(checkpoint=tmp_path / "fit"))


def test_a_loader_of_another_order_continues_with_a_warning(tmp_path, monkeypatch):
    own = torch.Generator().manual_seed(0)

    def call(**settings):
        return fit(classifier(), loaded(Own(), shuffle=True, generator=own), **settings)

    stopped(call, tmp_path / "fit", monkeypatch, 6)
    with pytest.warns(bmr.errors.PyroBMRWarning, match="other rows than before the stop.*epoch 2"):
        assert len(call(checkpoint=tmp_path / "fit").history) == 2


NAN = X.clone()
NAN[70, 1] = torch.nan
WRONG = Y.clone()
WRONG[65] = 3
BAD = {
    "empty loader": (
        lambda: fit(classifier(), loaded([])),
        "expected at least one batch, got none",
    ),
    "empty tensors": (
        lambda: fit(classifier(), loaded(TensorDataset(X[:0], Y[:0]))),
        "expected at least one batch, got none",
    ),
    "empty data set": (lambda: fit(classifier(), Own(X[:0], Y[:0])), "at least one row, got none"),
    "drop_last of all": (
        lambda: fit(classifier(), loaded(TensorDataset(X, Y), batch_size=200, drop_last=True)),
        "100 rows for batches of 200",
    ),
    "changing shape": (
        lambda: fit(classifier(), [(X[:32], Y[:32]), (X[:32, :3], Y[:32])], size=64),
        r"batch 2 of epoch 1: the program does not run .* on x of shape \(32, 3\)",
    ),
    "changing axes": (
        lambda: fit(classifier(), [(X[:32], Y[:32]), (X[:32, :, None], Y[:32])], size=64),
        r"batch 2 of epoch 1: x: expected rows of shape \(4,\) .* got shape \(4, 1\)",
    ),
    "changing keys": (
        lambda: fit(classifier(), [{"input": X, "labels": Y}, {"z": X, "labels": Y}], size=200),
        r"batch 2 of epoch 1: expected x\['input'\], y as in the first batch, got x\['z'\], y",
    ),
    "rows that differ": (
        lambda: fit(classifier(), [(X[:32], Y[:30])], size=64),
        r"the same number of rows everywhere.*got x \(32, 4\), y \(30,\)",
    ),
    "label in batch 7": (
        lambda: fit(classifier(), loaded(Own(y=WRONG), batch_size=10)),
        r"batch 7 of epoch 1: y is outside the support .*: got 3 in row 5",
    ),
    "label in a data set": (
        lambda: fit(classifier(), Own(y=WRONG), batch_size=50, shuffle=False),
        r"batch 2 of epoch 1: y is outside the support .*: got 3 in row 15",
    ),
    "NaN in batch 8": (
        lambda: fit(classifier(), loaded(Own(NAN), batch_size=10)),
        r"batch 8 of epoch 1, row 0: x is NaN or infinite",
    ),
    "NaN in a data set": (
        lambda: fit(classifier(), Own(NAN), batch_size=50, shuffle=False),
        r"batch 2 of epoch 1, row 70 of the data: x is NaN or infinite",
    ),
    "no length": (lambda: fit(classifier(), Batches()), "N of the posterior; give it, size=N"),
    "no length of a loader": (lambda: fit(classifier(), loaded(Stream())), "give it, size=N"),
    "samples of some rows": (
        lambda: fit(
            classifier(),
            loaded(Own(), sampler=torch.utils.data.RandomSampler(Own(), num_samples=50)),
        ),
        "give it, size=N",
    ),
    "size of tensors": (lambda: fit(classifier(), Own(), size=5), "size=5: the number of rows"),
    "size of a word": (lambda: fit(classifier(), Batches(), size="all"), "a whole number of rows"),
    "no labels": (
        lambda: fit(classifier(), [{"input": X}], size=100),
        "batch 1 of epoch 1: expected a pair .* got a dict with the keys 'input'",
    ),
    "labels alone": (lambda: fit(classifier(), [{"labels": Y}], size=100), "inputs beside the"),
    "a stream that ends": (
        lambda: fit(classifier(), iter(Batches().batches), size=100),
        "ended after 0 of 4 batches of epoch 2; an iterator is read once",
    ),
    "a size too large": (
        lambda: fit(classifier(), Batches(), size=500),
        "ended after 4 of 16 batches of epoch 1",
    ),
    "a table with text": (
        lambda: fit(classifier(), (pd.DataFrame({"age": [1.0, 2.0], "city": ["a", "b"]}), Y[:2])),
        r"x: column 'city' \(.*\) is not numbers; .*get_dummies\(frame, columns=\['city'\]\)",
    ),
    "classes in words": (
        lambda: fit(classifier(), (X[:2], pd.Series(["a", "b"], name="kind"))),
        r"y: column 'kind' .*pandas.factorize",
    ),
    "a table alone": (lambda: fit(classifier(), pd.DataFrame(X.numpy())), r"table\[features\]"),
    "a fraction of a loader": (
        lambda: fit(classifier(), loaded(Own()), validation=0.2),
        "a fraction of a loader cannot be held out",
    ),
    "an iterator to hold out": (
        lambda: fit(classifier(), (X, Y), validation=iter_forever(5)),
        "validation: expected a pair|validation: expected rows that can be read",
    ),
    "batch_size of a loader": (
        lambda: fit(classifier(), loaded(Own()), batch_size=64),
        "batch_size=64: a loader makes its own batches",
    ),
    "order of a loader": (
        lambda: fit(classifier(), loaded(TensorDataset(X, Y), shuffle=True), shuffle=False),
        "shuffle=False: the loader mixes its rows",
    ),
    "one row and batch norm": (
        lambda: fit(classifier(norm=nn.BatchNorm1d(6)), loaded(Own(), batch_size=33)),
        "batch 4 of epoch 1 has one row, which batch norm cannot take; .*drop_last=True",
    ),
    "rows that make no batch": (
        lambda: fit(classifier(), Ragged()),
        "rows 0 … of the data set do not make a batch .*collate_fn",
    ),
}


EXPOSED = torch.cat([torch.where(torch.arange(100) == 65, 0.0, 1.0)[:, None], X[:, :3]], 1)
ROWS = pd.DataFrame(X.numpy(), columns=list("abcd"))
UNKNOWN = torch.full((100,), torch.nan)


def lines(likelihood, inputs=4):
    torch.manual_seed(0)
    return bmr.BayesianNetwork(nn.Linear(inputs, 1), bmr.Gaussian(), likelihood)


BAD |= {
    "an exposure of 0 in batch 7": (
        lambda: fit(
            lines(bmr.Poisson(exposure=0), 3), loaded(Own(EXPOSED, Y.abs()), batch_size=10)
        ),
        "batch 7 of epoch 1: exposure: expected numbers > 0, got 0 in row 5",
    ),
    "an exposure of 0": (
        lambda: fit(lines(bmr.Poisson(exposure=0), 3), (EXPOSED, Y)),
        "the data: exposure: expected numbers > 0, got 0 in row 65",
    ),
    "a weight below 0": (
        lambda: fit(lines(bmr.likelihoods.Weighted(bmr.Normal(), 0), 3), (EXPOSED - 1, X[:, 0])),
        "the data: weights: expected numbers >= 0, got -1 in row 65",
    ),
    "no target that is observed": (
        lambda: fit(lines(bmr.Normal(missing="ignore")), (X, UNKNOWN)),
        "at least one target of site 'y' that is observed, got 100 that are missing",
    ),
    "no label that is observed": (
        lambda: fit(
            bmr.BayesianNetwork(
                nn.Linear(4, 3), bmr.Gaussian(), bmr.Categorical(ignore_index=-100)
            ),
            (X, torch.full((100,), -100)),
        ),
        "at least one target of site 'y' that is observed",
    ),
    "rows in another order": (
        lambda: fit(lines(bmr.Normal()), (ROWS, pd.Series(X[:, 0].numpy(), ROWS.index[::-1]))),
        r"the same rows in the same order.*give y.loc\[x.index\]",
    ),
    "rows of one input in another order": (
        lambda: fit(lines(bmr.Normal()), ({"first": ROWS, "second": ROWS[::-1]}, X[:, 0])),
        r"x\['first'\] and x\['second'\]: expected the same rows in the same order",
    ),
    "dates": (
        lambda: fit(classifier(), (ROWS.assign(a=pd.date_range("2020", periods=100)), Y)),
        r"column 'a' \(datetime.*turn dates into numbers",
    ),
    "a column of objects": (
        lambda: fit(classifier(), (ROWS.assign(a=ROWS["a"].astype(object)), Y)),
        r"frame.astype\(\{'a': 'float'\}\)",
    ),
    "labels in words": (
        lambda: fit(classifier(), (X, np.array(["u", "v"] * 50))),
        "make numbers of the texts; of classes: classes, codes = numpy.unique",
    ),
    "labels in a list": (lambda: fit(classifier(), (X, ["u", "v"] * 50)), "numpy.unique"),
    "NaN in an entry of a dict": (
        lambda: fit(classifier(), {"input": NAN, "labels": Y}),
        r"x\['input'\]: x is NaN or infinite, first in row 70",
    ),
    "an empty batch": (
        lambda: fit(classifier(), [(X[:50], Y[:50]), (X[:0], Y[:0])], size=50),
        r"batch 2 of epoch 1: expected the same number of rows everywhere, at least one",
    ),
    "batches of another dtype": (
        lambda: fit(classifier(), [(X[:50], Y[:50]), (X[50:].double(), Y[50:])], size=100),
        "torch.float32 as in the first batch, got shape .* and torch.float64",
    ),
    "texts in a batch of dicts": (
        lambda: fit(classifier(), [{"input": X, "text": ["a"] * 100, "labels": Y}], size=100),
        r"batch 1 of epoch 1: x\['text'\]: expected a tensor, got list",
    ),
}


class Ragged(Own):
    def __getitem__(self, number):
        return self.x[number][: 1 + number % 4], self.y[number]


@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_refused(case):
    call, words = BAD[case]
    with pytest.raises((bmr.errors.DataError, bmr.errors.FitError), match=words):
        call()


def test_data_with_a_graph_are_cut_off_from_it():
    x = X.clone().requires_grad_()
    first, again = (fit(lines(bmr.Normal()), (part, x[:, 0])) for part in (x, x * 1.0))
    assert same(first, again) and x.grad is None


def test_a_target_that_is_constant_is_told():
    with pytest.warns(bmr.errors.PyroBMRWarning, match="y is the same in all 100 rows"):
        fit(lines(bmr.Normal()), (X, torch.full((100,), 3.0)))
    fit(lines(bmr.Normal(noise=1.0)), (X, torch.full((100,), 3.0)))


def test_tables_with_other_labels_are_matched_by_their_place_with_a_warning():
    y = pd.Series(X[:, 0].numpy(), ROWS.index + 1000)
    with pytest.warns(bmr.errors.PyroBMRWarning, match="tables with different indexes"):
        by_place = fit(lines(bmr.Normal()), (ROWS, y))
    plain = fit(lines(bmr.Normal()), (X, X[:, 0]))
    for name, site in plain.posterior.sites.items():
        torch.testing.assert_close(by_place.posterior[name].mean, site.mean)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table[["b", "a", "c", "d"]], "a table with them in another order"),
        (lambda table: table.drop(columns="b"), "a table without 'b'"),
        (lambda table: table.rename(columns={"b": "z"}), "a table without 'b'; with 'z'"),
        (lambda table: table.assign(e=1.0), "a table with 'e'"),
    ],
)
def test_the_columns_at_prediction_are_those_of_the_fit(change, said):
    done = fit(lines(bmr.Normal()), (ROWS, X[:, 0]))
    means = [bmr.predict(done.program, done.posterior, x).mean for x in (ROWS, X)]
    torch.testing.assert_close(*means)
    with pytest.raises(bmr.errors.DataError, match=f"{said}; give x"):
        bmr.predict(done.program, done.posterior, change(ROWS))


def test_what_a_likelihood_reads_is_checked_at_prediction():
    good = torch.cat([torch.ones(100, 1), X[:, :3]], 1)
    done = fit(lines(bmr.Poisson(exposure=0), 3), (good, Y))
    with pytest.raises(bmr.errors.DataError, match="to predict: exposure: expected numbers > 0"):
        bmr.predict(done.program, done.posterior, EXPOSED)
    with pytest.raises(bmr.errors.DataError, match="the data: exposure: expected numbers > 0"):
        bmr.curvature(nn.Linear(3, 1), (EXPOSED, Y.float()), bmr.Poisson(exposure=0))


def test_a_loader_of_other_rows_than_its_data_set_has_is_told():
    class Some:
        """Half of the rows, in batches."""

        def __iter__(self):
            return iter([list(range(25)), list(range(25, 50))])

        def __len__(self):
            return 2

    with pytest.warns(
        bmr.errors.PyroBMRWarning, match="had 50 rows in the first epoch.*counts 100"
    ):
        fit(classifier(), DataLoader(Own(), batch_sampler=Some()))
    fit(classifier(), DataLoader(Own(), batch_sampler=Some()), size=50)
