"""A short run of the fuzzer on each reader, and hostile pickles in the place of each file that is
read.
"""

import pickle

import pytest
import torch

import pyro_bmr as bmr
from tests.data.test_data import Bomb
from tests.fuzz import fuzz, readers

NAMES = (
    "npz",
    "csv",
    "idx",
    "posterior",
    "checkpoint",
    "reduction",
    "decisions",
    "report",
    "run",
    "results",
)


def test_every_reader_is_fuzzed(tmp_path):
    assert tuple(readers(tmp_path)) == NAMES


@pytest.mark.parametrize(
    ("inputs", "least"), [(100, (2, 10)), pytest.param(300, (11, 31), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", NAMES)
def test_readers_give_a_result_or_an_error_of_the_library(name, inputs, least, tmp_path):
    outcomes = fuzz(name, inputs, 3, tmp_path)
    refused = sum(outcomes.values()) - outcomes["read"]
    assert outcomes["read"] >= least[0] and refused >= least[1], outcomes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "write",
    [lambda bomb: pickle.dumps(bomb), lambda bomb: saved_by_torch(bomb)],
    ids=["pickle", "torch"],
)
def test_a_hostile_pickle_in_the_place_of_a_file_does_not_act(name, write, tmp_path):
    reader, marker = readers(tmp_path)[name](), tmp_path / "marker"
    reader.file.write_bytes(write(Bomb(marker)))
    with pytest.raises(bmr.PyroBMRError):
        reader.read()
    assert not marker.exists()
    with pytest.raises(Exception):  # noqa: B017
        torch.load(reader.file, weights_only=True)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the pickle does act"


def saved_by_torch(bomb):
    import io

    file = io.BytesIO()
    torch.save({"w": bomb}, file)
    return file.getvalue()
