"""A deployed network is read back by one call, with one input or several."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import pyro_bmr as bmr
from pyro_bmr.data.inputs import called
from tests.parameters import others_slow
from tests.shrinking.test_kinds import built, unit_masks


def agree(net, other, x, atol=1e-6):
    with torch.no_grad():
        want, got = tree_leaves(called(net, x)), tree_leaves(called(other, x))
    assert len(want) == len(got) > 0
    for p, q in zip(want, got, strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=atol)


@pytest.mark.filterwarnings("ignore:deploy.*cannot be written as Python")
@pytest.mark.parametrize(
    "name",
    others_slow(
        ["maxout_and_highway", "feature_wise_modulation", "one_dict", "named_inputs", "decoder"],
        "named_inputs",
    ),
)
def test_a_deployed_network_is_loaded_by_one_call(name, tmp_path):
    net, x = built(name, 2, False)
    small = bmr.shrink(net, unit_masks(net, 0.4, 2), x)
    half = ["half"] * (name != "decoder")  # whose rotations are computed in float32
    bmr.deploy(small, tmp_path, x, formats=["program", "state_dict", *half], seconds=0)
    loaded = bmr.load_network(tmp_path)
    agree(small, loaded, x)
    agree(small, loaded, tree_map(lambda t: torch.cat([t, t[:3]]), x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_dict", "feature_wise_modulation", "named_inputs"])
def test_onnx_of_several_inputs(name, tmp_path):
    pytest.importorskip("onnx")
    net, x = built(name, 2, False)
    with pytest.warns(bmr.PyroBMRWarning, match="cannot be written as Python"):
        bmr.deploy(net, tmp_path, x, formats=["onnx"], seconds=0)
    with pytest.raises(bmr.errors.ModelError, match=r"no program; deploy it with formats="):
        bmr.load_network(tmp_path)


def test_a_folder_that_is_not_the_one_that_was_written(tmp_path):
    with pytest.raises(bmr.errors.ModelError, match="expected a folder that `deploy` wrote"):
        bmr.load_network(tmp_path)
    net = torch.nn.Sequential(torch.nn.Linear(3, 2))
    bmr.deploy(net, tmp_path, torch.randn(4, 3), seconds=0)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(bmr.errors.ModelError, match="cannot be loaded: model.safetensors is not"):
        bmr.load_network(tmp_path)
    with (tmp_path / "network.py").open("a") as file:
        file.write("raise RuntimeError")
    with pytest.raises(bmr.errors.ModelError, match=r"network.py is not the file"):
        bmr.load_network(tmp_path)
