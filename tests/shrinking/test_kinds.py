"""Networks of the kinds that people use are shrunk, at any share of removed units."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import pyro_bmr as bmr
from pyro_bmr.data.inputs import called
from pyro_bmr.shrinking import masked
from pyro_bmr.shrinking.verification import inputs_like
from tests.shrinking.kinds import KINDS

# of which half of the units, drawn one by one, leave all that is coupled to another
WHOLE = {
    "maxout_and_highway", "grouped_heads", "grouped_heads_of_torch", "written_attention",
    "named_inputs", "recurrent", "fourier_layers",
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")


def unit_masks(net, pruned, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, p in net.named_parameters():
        kept = torch.rand((len(p), *[1] * (p.ndim - 1)), generator=generator) >= pruned
        masks[name] = kept.expand(p.shape).clone()
    return masks


def built(name, seed, double):
    torch.manual_seed(seed)
    net, example = KINDS[name]()
    net.eval()
    if double:
        net = net.double()
        example = tree_map(lambda t: t.double() if t.is_floating_point() else t, example)
    return net, example


def check_kind(name, pruned, double):
    net, example = built(name, 3, double)
    masks = unit_masks(net, pruned, 3)
    plan = bmr.shrinking.shrink_plan(net, masks, example)
    small, full = plan.apply(), masked(net, masks)
    assert sum(p.numel() for p in small.parameters()) == plan.parameters[1]
    for x in inputs_like(example, net):
        for rows in (x, tree_map(lambda t: torch.cat([t, t.flip(0)]), x)):
            with torch.no_grad():
                want, got = tree_leaves(called(full, rows)), tree_leaves(called(small, rows))
            assert len(want) == len(got) > 0
            for p, q in zip(want, got, strict=True):
                size = max(1.0, float(p.abs().max()))
                error = float((p - q.detach()).abs().max())
                assert error <= (1e-12 if double else 1e-5) * size
    return plan


@pytest.mark.parametrize("name", KINDS)
def test_half_of_the_units(name):
    plan = check_kind(name, 0.5, True)
    before, after = plan.parameters
    assert after <= before * (1 if name in WHOLE else 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("pruned", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_any_share_of_the_units(name, double, pruned):
    before, after = check_kind(name, pruned, double).parameters
    assert after <= before and (pruned < 1 or after <= 0.02 * before)
