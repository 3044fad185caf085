"""Networks on another device: read and cut on the CPU, and back where they were.

Numbers cannot be computed on a device that is not here. So "meta", without numbers, stands for the
place that a result goes to. An operation of a tensor there with one on the CPU raises.
"""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.data.inputs import called, of_each
from pyro_bmr.shrinking.home import Home
from pyro_bmr.shrinking.plan import shrink_plan
from tests.parameters import others_slow
from tests.shrinking.kinds import KINDS
from tests.shrinking.networks import ViT, random_masks


class Positions(nn.Module):
    """Makes a tensor on a device that it holds."""

    def __init__(self):
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.device = torch.device("cpu")

    def forward(self, x):
        places = torch.arange(x.shape[1], device=self.device)
        return self.last(self.hidden(x + self.table(places)).relu())

    def hidden(self, x):
        return self.first(x)


class Scaled(Positions):
    """Holds a tensor that is no buffer, and a device by its name."""

    def __init__(self):
        super().__init__()
        self.where, self.scale = "cpu", torch.linspace(1, 2, 8)

    def hidden(self, x):
        return self.first(x) * self.scale + torch.ones(8, device=self.where)


def made(kind):
    torch.manual_seed(0)
    return kind().eval(), torch.randn(3, 6, 8)


def every_other_unit(net):
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[::2] = False
    return {"first.weight": mask, "first.bias": mask[:, 0]}


@pytest.fixture
def from_meta(monkeypatch):
    """Lets networks on the CPU pass for networks on "meta"; `attributes` are theirs."""
    attributes = {}
    there = Home(torch.device("meta"), attributes)
    monkeypatch.setattr("pyro_bmr.shrinking.plan.to_cpu", lambda net: there)
    return attributes


@pytest.mark.parametrize("kind", [Positions, Scaled])
def test_tensors_of_the_forward_are_made_where_the_network_was(kind, from_meta):
    net, x = made(kind)
    from_meta["", "device"] = torch.device("meta")
    plan = shrink_plan(net, every_other_unit(net), x)
    small = plan.apply()
    assert plan.own_class == (kind is Positions)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    assert {t.device.type for t in (*small.parameters(), *small.buffers())} == {"meta"}
    assert small(x.to("meta")).shape == (3, 6, 2)
    if kind is Scaled:
        made_on = [n.kwargs["device"] for n in small.graph.nodes if "device" in n.kwargs]
        assert made_on == [torch.device("meta")]


@pytest.mark.parametrize(
    "name",
    others_slow(
        ["written_attention", "recurrent", "tied_weights", "patches"], "tied_weights", "patches"
    ),
)
def test_results_go_where_the_network_was(name, from_meta):
    net, example = KINDS[name]()
    masks = random_masks(net, 0.5, "rows", 0)
    small = bmr.shrink(net, masks, example)
    held = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    assert {t.device.type for t in held.values()} == {"meta"}
    called(small, of_each(lambda t: t.to("meta"), example))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["written_attention", "vit", "patches"])
def test_a_default_device_changes_nothing(kind):
    torch.manual_seed(0)
    net, x = (ViT(), torch.randn(2, 1, 8, 8)) if kind == "vit" else KINDS[kind]()
    masks = random_masks(net, 0.5, "rows", 0)
    want = bmr.shrink(net, masks, x).state_dict()
    torch.set_default_device("meta")
    try:
        found = bmr.shrink(net, masks, x).state_dict()
    finally:
        torch.set_default_device(None)
    assert want.keys() == found.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_networks_without_values_are_refused():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    with pytest.raises(bmr.errors.ShrinkError, match="one device, with values, got some on meta;"):
        bmr.shrink(net.to("meta"), {}, x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["written_attention", "recurrent", "grouped_bottleneck"])
def test_on_a_gpu(name):
    net, example = KINDS[name]()
    masks = random_masks(net, 0.5, "rows", 0)
    want = bmr.shrink(net, masks, example)(example)
    small = bmr.shrink(net.cuda(), masks, example.cuda())
    torch.testing.assert_close(small(example.cuda()).cpu(), want, rtol=1e-3, atol=1e-3)


def test_an_unused_tensor_without_values_changes_nothing_on_the_cpu():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    net.register_buffer("later", torch.empty(2, device="meta"), persistent=False)
    mask = torch.tensor([[True], [False], [True], [True]]).expand(4, 3)
    net[0].bias.data[1] = 0
    small = bmr.shrink(net, {"0.weight": mask}, x)
    assert small[0].weight.shape == (3, 3)


def test_generators_of_other_devices_are_left_alone(monkeypatch):
    """`torch.manual_seed` seeds those of all devices."""
    net, x = made(Positions)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeded everywhere"))
    before = torch.get_rng_state()
    bmr.shrink(net, every_other_unit(net), x)
    assert torch.equal(torch.get_rng_state(), before)
