"""Arrays, tables and files as tensors, and what is asked of batches."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

import pyro_bmr as bmr
from pyro_bmr.curvatures import curvature
from pyro_bmr.data.batch import BatchChecks, pair_in
from pyro_bmr.data.given import columns_in, example_of, source_of
from pyro_bmr.data.inputs import parts_of
from pyro_bmr.data.row_sources import Held, Indexed, Stream, chunks
from pyro_bmr.data.tables import tensors_of
from pyro_bmr.errors import DataError
from pyro_bmr.exporting import deploy
from pyro_bmr.likelihoods import Categorical
from pyro_bmr.post_training import prune
from pyro_bmr.prediction import predict_networks
from pyro_bmr.shrinking import fold_batch_norms, reader_labels, shrink, shrink_plan
from tests.parameters import others_slow

NUMBERS = np.arange(24).reshape(6, 4)
CONVERTED = {
    "float64": (NUMBERS / 7, torch.float64),
    "int64": (NUMBERS, torch.int64),
    "another order of bytes": ((NUMBERS / 7).astype(">f4"), torch.float32),
    "backwards": (NUMBERS[::-1, ::-1], torch.int64),
    "long doubles": ((NUMBERS / 7).astype(np.longdouble), torch.float64),
    "not to be written": (np.frombuffer(NUMBERS.tobytes(), np.int64).reshape(6, 4), torch.int64),
    "a table": (pd.DataFrame(NUMBERS / 7), torch.float64),
    "a table of whole numbers": (pd.DataFrame(NUMBERS), torch.float64),
    "a column": (pd.Series(NUMBERS[:, 1]), torch.int64),
    "a column of truth values": (pd.Series([True, False, True]), torch.int64),
    "a nullable column": (pd.Series([3, 1], dtype="Int32"), torch.int64),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_arrays_and_tables_become_tensors_of_their_numbers(case):
    value, dtype = CONVERTED[case]
    tensor = tensors_of(value, "x")
    assert tensor.dtype == dtype
    want = np.asarray(value).astype(np.float64)
    assert np.array_equal(tensor.double().numpy(), want) and tensor.shape == want.shape


def test_a_missing_value_of_a_nullable_column_is_nan():
    found = tensors_of(pd.Series([1, None, 3], dtype="Int64"), "y")
    assert found.isnan().tolist() == [False, True, False] and found[2] == 3


def test_an_array_is_not_copied_and_a_tuple_or_dict_is_converted_part_by_part():
    array = np.ones((3, 2), np.float32)
    array_in_tuple, in_dict = tensors_of((array, torch.ones(3)), "x"), tensors_of({"a": array}, "x")
    array[1, 1] = 5
    assert array_in_tuple[0][1, 1] == 5 == in_dict["a"][1, 1]


X, Y = torch.arange(12.0).view(6, 2), torch.arange(6)
PAIRS = {
    "a pair": ((X, Y), X, Y),
    "a list": ([X, Y], X, Y),
    "several inputs": ((X, -X, Y), (X, -X), Y),
    "a dict": ({"a": X, "labels": Y, "b": -X}, {"a": X, "b": -X}, Y),
    "a label": ({"a": X, "label": Y}, {"a": X}, Y),
}


@pytest.mark.parametrize("case", PAIRS)
def test_the_targets_in_a_batch(case):
    batch, x, y = PAIRS[case]
    found = pair_in(batch, "batch 1")
    assert found[1] is y
    assert str(found[0]) == str(x)


def test_inputs_alone_have_no_targets():
    for batch in (X, [X], {"a": X}):
        x, y = pair_in(batch, "batch 1", targets=False)
        assert y is None and (x is X or x["a"] is X)
        with pytest.raises(DataError, match="batch 1: expected a pair"):
            pair_in(batch, "batch 1")


def load(dataset=None, **settings):
    return DataLoader(TensorDataset(X, Y) if dataset is None else dataset, 4, **settings)


SIZES = {
    "its own order": (load(num_workers=2), Held, 6, None),
    "shuffled": (load(shuffle=True), Held, 6, None),
    "another collate": (load(collate_fn=lambda rows: rows), Stream, 6, 2),
    "a generator of its own": (load(shuffle=True, generator=torch.Generator()), Stream, 6, 2),
    "a subset": (load(sampler=SubsetRandomSampler([1, 2, 3, 4, 5])), Stream, 5, 2),
    "with replacement": (load(sampler=RandomSampler(Y, replacement=True)), Stream, 6, 2),
    "fewer rows": (load(sampler=RandomSampler(Y, num_samples=3)), Stream, None, 1),
    "a data set": (TensorDataset(X, Y), Indexed, 6, None),
}


@pytest.mark.parametrize("case", SIZES)
def test_the_number_of_rows_of_a_loader(case):
    data, kind, rows, steps = SIZES[case]
    source = source_of(data)
    assert type(source) is kind
    if isinstance(source, Held):
        assert source.x is X and source.y is Y
        assert source.order.shuffle == (case == "shuffled")
    else:
        assert source.size == rows
    if isinstance(source, Stream):
        assert source.steps == steps and source.shuffled == (case != "another collate")


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
@pytest.mark.parametrize("part", [slice(None), slice(2, 5)])
def test_rows_of_a_file_are_those_of_the_array(mode, part, tmp_path):
    """Also behind an offset, in stretches, twice, and where a private mapping was written to."""
    array = np.memmap(tmp_path / "x", "<f4", "w+", offset=4104, shape=(6, 3))
    array[:] = np.random.default_rng(0).standard_normal((6, 3))
    array.flush()
    mapped = np.memmap(tmp_path / "x", "<f4", mode, offset=4104, shape=(6, 3))[part]
    if mode != "r":
        mapped[1, 1] = 9.0
    source = source_of((mapped, Y[part]))
    for numbers in ([0, 1, 2], [2, 0, 0], [1]):
        x, y = source.read(numbers)
        assert np.array_equal(x.numpy(), np.array(mapped)[numbers])
        assert torch.equal(y, Y[part][numbers])
    if mode == "r":
        (tmp_path / "x").unlink()
        assert np.array_equal(source.read([2])[0].numpy(), np.array(mapped)[[2]])


def test_columns_of_a_file_of_other_lengths_are_refused(tmp_path):
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(6, 3))
    with pytest.raises(DataError, match=r"x of shape \(6, 3\), y of shape \(5,\)"):
        source_of((mapped, Y[:5]))


FORMS = {
    "an array": X.double().numpy(),
    "a table": pd.DataFrame(X.double().numpy()),
    "a loader": load(shuffle=True),
    "a data set": TensorDataset(X, Y),
    "a tuple": (X,),
}


@pytest.mark.parametrize("case", FORMS)
def test_a_network_is_shrunk_with_rows_in_any_form(case):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    net[2].weight.data[:, :3] = 0
    example = example_of(FORMS[case], net)
    assert example.shape[1:] == (2,) and example.dtype == torch.float32
    assert shrink(net, {}, FORMS[case])[0].out_features == 1


@pytest.mark.parametrize(
    ("given", "dtype"),
    others_slow(
        [
            (given, dtype)
            for given in (torch.float32, torch.float64)
            for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        ],
        *((torch.float32, torch.bfloat16), (torch.float64, torch.float32)),
    ),
)
def test_rows_take_the_dtype_of_the_network(dtype, given, tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    net[2].weight.data[:, :3] = 0
    net, x, y = net.to(dtype), X.to(given) / 12, Y % 2
    plan = shrink_plan(net, {}, x)
    assert plan.apply()[0].weight.shape == (1, 2) and plan.apply()[0].weight.dtype == dtype
    assert len(plan.latency(x, batches=(1,), seconds=1e-3)) == 1
    assert reader_labels(net, x)["2.weight"].shape == (1, 4)
    assert fold_batch_norms(net, x)[0].weight.dtype == dtype
    deploy(net, tmp_path / "folder", x, formats=["program"], seconds=1e-3)
    settings = {"progress": False, "corrections": 1, "last_corrections": 1}
    assert bool(prune(net, (x, y), Categorical(), 0.5, **settings).masks)
    assert predict_networks([net], Categorical(), x).probs.shape == (6, 2)


def test_whole_numbers_of_an_example_keep_their_type():
    net = torch.nn.Sequential(torch.nn.Embedding(6, 2), torch.nn.Linear(2, 2)).bfloat16()
    for value in (Y, Y.int(), Y.numpy()):
        assert example_of(value, net).dtype in (torch.int64, torch.int32)
    assert example_of({"a": X, "b": Y}, net)["a"].dtype == torch.bfloat16


def halves(of):
    return [of(slice(0, 3)), of(slice(3, 6))]


FRAME, SERIES = pd.DataFrame(X.numpy()), pd.Series(Y.numpy())
BATCHES = {
    "pairs": halves(lambda rows: (X[rows], Y[rows])),
    "lists": halves(lambda rows: [X[rows], Y[rows]]),
    "arrays": halves(lambda rows: (X[rows].numpy(), Y[rows].numpy())),
    "tables": halves(lambda rows: (FRAME[rows], SERIES[rows])),
    "dicts": halves(lambda rows: {"x": X[rows], "labels": Y[rows]}),
    "a tuple of inputs": halves(lambda rows: ((X[rows], -X[rows]), Y[rows])),
    "a list of inputs": halves(lambda rows: ([X[rows], -X[rows]], Y[rows])),
    "a dict of inputs": halves(lambda rows: ({"a": X[rows]}, Y[rows])),
    "three of each": halves(lambda rows: (X[rows], -X[rows], Y[rows])),
}


@pytest.mark.parametrize("more", [0, 1, -1])
@pytest.mark.parametrize("case", BATCHES)
def test_a_list_of_two_batches_is_one_of_batches(case, more):
    data = BATCHES[case][:1] if more < 0 else BATCHES[case] + BATCHES[case][:more]
    for size in (None, 6):
        source = source_of(data, size=size)
        assert isinstance(source, Stream) and (source.size, source.steps) == (size, len(data))
        x, y = next(chunks(source, 100, BatchChecks()))
        assert torch.equal(y, torch.cat([Y, Y])[: 3 * len(data)])
        first = next(iter(parts_of(x).values()))
        assert torch.equal(first.float(), torch.cat([X, X])[: 3 * len(data)])


GIVEN_PAIRS = {
    "tensors": (X, Y),
    "a list": [X, Y],
    "two rows": (X[:2], Y[:2]),
    "a tuple of inputs": ((X, -X), Y),
    "a list of inputs": ([X, -X], Y),
    "lists": [[X, -X], Y],
    "a dict of inputs": ({"a": X, "b": -X}, Y),
    "arrays": ([X.numpy(), X.numpy()], Y.numpy()),
    "tables": [FRAME, SERIES],
}


@pytest.mark.parametrize("case", GIVEN_PAIRS)
def test_a_pair_of_several_inputs_and_targets_is_a_pair(case):
    source = source_of(GIVEN_PAIRS[case])
    assert isinstance(source, Held) and torch.equal(source.y, Y[: len(source.y)])
    with pytest.raises(DataError, match="size=6: the number of rows of a .* is known"):
        source_of(GIVEN_PAIRS[case], size=6)


@pytest.mark.parametrize("case", ["pairs", "dicts", "a tuple of inputs"])
def test_a_tuple_of_two_batches_may_be_a_pair_and_is_refused(case):
    with pytest.raises(DataError, match="y: expected one tensor of targets.*batches.*as a list"):
        source_of(tuple(BATCHES[case]))
    assert isinstance(source_of(tuple(BATCHES[case]), size=6), Stream)


@pytest.mark.filterwarnings("ignore:the fit has not converged")
def test_two_batches_are_fitted_pruned_and_scored_as_their_rows():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 6))
    likelihood, pairs = Categorical(), BATCHES["pairs"]
    for fisher in ("true", "empirical"):
        settings = {"fisher": fisher, "progress": False}
        found, want = (curvature(net, d, likelihood, **settings) for d in (pairs, (X, Y)))
        assert found.rows == want.rows == 6
        if fisher == "empirical":
            assert torch.allclose(found["0.weight"][0], want["0.weight"][0])
        settings |= {"corrections": 1, "last_corrections": 1}
        assert prune(net, pairs, likelihood, 0.5, **settings).masks
    model = bmr.BayesianNetwork(net, bmr.Gaussian(), likelihood)
    settings = {"epochs": 20, "optimizer": bmr.adam(1e-2), "progress": False, "shuffle": False}
    fits = [
        bmr.fit(model, data, size=size, validation=pairs, **settings, **batch)
        for data, size, batch in ((pairs, 6, {}), ((X, Y), None, {"batch_size": 3}))
    ]
    assert torch.equal(*(fit.posterior["0.weight"].mean for fit in fits))
    assert fits[0].history["validation_nll"].equals(fits[1].history["validation_nll"])
    with pytest.raises(DataError, match="give it, size=N"):
        bmr.fit(model, pairs, **settings)
    assert columns_in(BATCHES["tables"]) == columns_in((FRAME, SERIES)) == ("0", "1")
