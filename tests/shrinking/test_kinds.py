"""Networks of the kinds that people use are shrunk, at any share of removed units."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import pyro_bmr as bmr
from pyro_bmr.data.inputs import called
from pyro_bmr.shrinking import masked
from pyro_bmr.shrinking.plan import shrink_each
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
    small = plan.apply()
    assert parameters(small) == plan.parameters[1]
    check_same_function(masked(net, masks), small, example, double)
    return plan.parameters


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def check_same_function(full, small, example, double):
    for x in inputs_like(example, full):
        for rows in (x, tree_map(lambda t: torch.cat([t, t.flip(0)]), x)):
            with torch.no_grad():
                want, got = tree_leaves(called(full, rows)), tree_leaves(called(small, rows))
            assert len(want) == len(got) > 0
            for p, q in zip(want, got, strict=True):
                size = max(1.0, float(p.abs().max()))
                error = float((p - q.detach()).abs().max())
                assert error <= (1e-12 if double else 1e-5) * size


def some_slow(names):
    """Every twenty-sixth name; the others are marked as slow."""
    return [
        name if k % 26 == 0 else pytest.param(name, marks=pytest.mark.slow)
        for k, name in enumerate(names)
    ]


@pytest.mark.parametrize("name", some_slow(KINDS))
def test_half_of_the_units(name):
    before, after = check_kind(name, 0.5, True)
    assert after <= before * (1 if name in WHOLE else 0.9)


def check_share(before, after, pruned):
    # without units the outputs are constants, one number each
    assert after <= before and (pruned < 1 or after <= max(0.02 * before, 8))


@pytest.mark.slow
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_any_share_of_the_units(name, double):
    """The graph of a network is read once for all shares."""
    net, example = built(name, 3, double)
    shares = (0.5, 0.9, 0.99, 1.0)
    nets = [masked(net, unit_masks(net, pruned, 3)) for pruned in shares]
    for pruned, full, small in zip(shares, nets, shrink_each(nets, example), strict=True):
        check_same_function(full, small, example, double)
        check_share(parameters(full), parameters(small), pruned)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_plan_without_a_unit(name):
    check_share(*check_kind(name, 1.0, True), 1.0)


@pytest.mark.filterwarnings("ignore::pyro_bmr.PyroBMRWarning")
def test_a_network_of_one_dict_from_the_fit_to_the_smaller_network():
    torch.manual_seed(0)
    example = {"x": torch.randn(20, 6), "z": torch.randn(20, 4)}

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(6, 10), torch.nn.Linear(4, 10)
            self.out = torch.nn.Linear(20, 3)

        def forward(self, batch):
            h = torch.cat([self.a(batch["x"]), self.b(batch["z"])], -1)
            return self.out(torch.relu(h))

    program = bmr.BayesianNetwork(Net(), bmr.Gaussian(), bmr.Categorical())
    labels = torch.randint(3, (20,))
    fit = bmr.fit(program, (example, labels), epochs=2, progress=False)
    reduction = bmr.reduce(fit.posterior, to=bmr.Gaussian(scale=0), per="unit", kept=0.5)
    dense = bmr.export(fit.program, reduction.posterior)
    small = bmr.shrink(dense, reduction.masks, example)
    torch.testing.assert_close(small(example), dense(example), rtol=0, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 183
