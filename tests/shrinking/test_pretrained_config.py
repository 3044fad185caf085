"""The configuration of a model of Hugging Face's kind after its tensors are cut."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pyro_bmr as bmr


class Model(nn.Module):
    """Two blocks of attention and units. The scores are scaled by the size of a head, so that a
    model with fewer heads is not one with smaller heads.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, inner = config.width, config.heads * config.size
        self.queries = nn.ModuleList(nn.Linear(width, 3 * inner) for _ in range(config.layers))
        self.outputs = nn.ModuleList(nn.Linear(inner, width) for _ in range(config.layers))
        self.up = nn.ModuleList(nn.Linear(width, config.units) for _ in range(config.layers))
        self.down = nn.ModuleList(nn.Linear(config.units, width) for _ in range(config.layers))
        self.scale = config.size**-0.5
        self.heads = config.heads

    def forward(self, x):
        for k in range(len(self.up)):
            parts = self.queries[k](x).view(*x.shape[:2], 3, self.heads, -1).unbind(2)
            q, key, v = (part.transpose(1, 2) for part in parts)
            mixed = torch.softmax(q @ key.mT * self.scale, -1) @ v
            x = x + self.outputs[k](mixed.transpose(1, 2).flatten(2))
            x = x + self.down[k](torch.relu(self.up[k](x)))
        return x

    def save_pretrained(self, folder):
        raise NotImplementedError


def masks_of(net, units, heads):
    """So many units of each block are kept, and these heads of 5 rows."""
    masks = {}
    rows = torch.zeros(4, dtype=torch.bool)
    rows[heads] = True
    inner = rows.repeat_interleave(5)
    for k, count in enumerate(units):
        kept = torch.arange(net.config.units) < count
        masks[f"up.{k}.weight"] = kept[:, None].expand_as(net.up[k].weight)
        masks[f"up.{k}.bias"] = kept
        masks[f"outputs.{k}.weight"] = inner[None].expand_as(net.outputs[k].weight)
    return masks


def made(layers):
    torch.manual_seed(0)
    return Model(SimpleNamespace(width=6, heads=4, size=5, units=16, layers=layers)).eval()


@pytest.fixture
def net():
    return made(2)


@pytest.mark.slow
def test_the_entries_of_the_smaller_model(net):
    x = torch.randn(3, 5, 6)
    plan = bmr.shrinking.shrink_plan(net, masks_of(net, (10, 10), [0, 2, 3]), x)
    small = plan.apply()
    assert plan.own_class and plan.config == {"heads": 3, "units": 10}
    assert "configuration: heads = 3, units = 10" in str(plan)
    assert (small.config.heads, small.config.size, small.config.units) == (3, 5, 10)
    assert net.config.units == 16, "the original is not changed"
    again = Model(small.config).eval()
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again(x), small(x))


@pytest.mark.slow
def test_blocks_of_different_sizes_have_no_configuration(net):
    x = torch.randn(3, 5, 6)
    plan = bmr.shrinking.shrink_plan(net, masks_of(net, (10, 9), [0, 1, 2, 3]), x)
    assert plan.own_class and plan.config is None
    assert "from_pretrained cannot load it" in str(plan)
    assert plan.apply().config.units == 16
    with pytest.warns(bmr.PyroBMRWarning, match="no configuration of Model.*from_pretrained"):
        bmr.shrink(net, masks_of(net, (10, 9), [0, 1, 2, 3]), x)


@pytest.mark.slow
def test_nothing_to_change():
    x = torch.randn(3, 5, 6)
    assert bmr.shrinking.shrink_plan(made(1), {}, x).config == {}
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    masks = {"0.weight": torch.arange(8)[:, None].expand(8, 6) < 3}
    assert bmr.shrinking.shrink_plan(plain, masks, x[:, 0]).config == {}
