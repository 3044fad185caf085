"""What is not deployed, and damaged files: refused by name, with nothing left behind."""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.exporting.formats import FORMATS
from tests.exporting.networks import loaders, sparse_net
from tests.shrinking.networks import NETS, made


@pytest.fixture(scope="module")
def x():
    return bmr.load("digits").x_train[:40]


class Odd(nn.Module):
    def forward(self, x):
        return x.double().round().to(x.dtype) if x.sum() > 0 else x


REFUSED = {
    "unknown format": (
        lambda: sparse_net()[0],
        ["tflite"],
        bmr.errors.ModelError,
        r"no format 'tflite'; the formats are: state_dict, safetensors",
    ),
    "csr of a dense network": (
        lambda: sparse_net()[0],
        ["state_dict", "csr"],
        bmr.errors.ModelError,
        r"'csr': expected a Linear layer with at least 97% zeros, got 0\.0% in the sparsest",
    ),
    "2:4 on a CPU": (
        lambda: sparse_net()[0],
        ["half", "2:4"],
        bmr.errors.ModelError,
        r"'2:4': expected a CUDA device.*'cpu'",
    ),
    "no layers to prune": (
        lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)),
        ["prune"],
        bmr.errors.ModelError,
        r"'prune': expected a Linear or Conv layer",
    ),
    "control flow": (
        Odd,
        ["program"],
        bmr.errors.ModelError,
        r"format 'program' cannot hold this network .*leave it out of `formats`",
    ),
}


@pytest.mark.parametrize(("build", "formats", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_leave_nothing_behind(build, formats, error, message, x, tmp_path):
    with pytest.raises(error, match=message):
        bmr.deploy(build(), tmp_path / "new", x, formats=formats, seconds=0)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_a_format_that_changes_the_outputs_is_refused(x, tmp_path):
    net, _ = sparse_net()
    bmr.deploy(net, tmp_path, x, seconds=0)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        net[1].weight.mul_(1e6)  # beyond half precision
    with pytest.raises(bmr.errors.ModelError, match=r"'half': read back, its outputs differ"):
        bmr.deploy(net, tmp_path, x, formats=["half"], seconds=0)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written(x, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(bmr.PyroBMRError, match="cannot write to"):
        bmr.deploy(sparse_net()[0], tmp_path / "file", x, seconds=0)


@pytest.mark.parametrize("file", ["model.safetensors", "state_dict.pt", "model.pt2"])
@pytest.mark.parametrize("damage", ["truncated", "tampered"])
def test_damaged_files_are_refused(file, damage, deployed):
    raw = (deployed / file).read_bytes()
    try:
        (deployed / file).write_bytes(
            raw[:-9] if damage == "truncated" else raw[:-1] + bytes([raw[-1] ^ 1])
        )
        loader = next(f.loader for f in FORMATS.values() if f.file == file)
        with pytest.raises(
            ValueError, match=rf"{file} is not the file that was written: its sha256"
        ):
            getattr(loaders(deployed), loader)()
    finally:
        (deployed / file).write_bytes(raw)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory, x):
    folder = tmp_path_factory.mktemp("deployed")
    bmr.deploy(
        made(NETS["mlp"], 2).float(), folder, x, formats=["state_dict", "program"], seconds=0
    )
    return folder


def test_a_truncated_file_is_refused_without_a_report_too(x, tmp_path):
    net, _ = sparse_net()
    bmr.deploy(net, tmp_path, x, seconds=0)
    (tmp_path / "report.json").unlink()
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert torch.equal(loaders(tmp_path).load()(x), net(x))
    for cut in (raw[:-4], raw[:40], raw[:5], b""):
        (tmp_path / "model.safetensors").write_bytes(cut)
        with pytest.raises(
            ValueError, match=r"model\.safetensors is truncated or no safetensors file"
        ):
            loaders(tmp_path).load()
