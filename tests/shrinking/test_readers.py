"""Which weights read the same hidden unit, and that a unit that is not read is removed."""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.post_training.rounds_file import about_call
from pyro_bmr.shrinking import reader_labels
from tests.shrinking.kinds import KINDS

# no unit of these can be removed by its readers alone
NONE = {
    "grouped_transposed_convolution", "grouped_heads", "grouped_heads_of_torch",
    "written_attention", "one_dict", "an_ensemble_in_one_product",
}  # fmt: skip
# units that are compared, levelled or shuffled with others, of which both have to go
COUPLED = {"maxout_and_highway", "recurrent", "shuffled_channels"}


def groups_of(labels):
    return [one.flatten().tolist() for one in labels.values()]


def test_the_units_of_a_perceptron_are_read_by_the_columns_of_the_next_layer():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 5))
    labels = reader_labels(net, torch.randn(3, 4))
    assert {n: tuple(one.shape) for n, one in labels.items()} == {
        "2.weight": (1, 3),
        "4.weight": (1, 2),
    }
    assert groups_of(labels) == [[0, 1, 2], [3, 4]]


def test_channels_are_read_by_filters_and_by_each_of_their_pixels():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3, padding=1),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4),
    ).eval()  # fmt: skip
    labels = reader_labels(net, torch.randn(1, 1, 6, 6))
    assert labels["3.weight"].shape == (1, 2, 1, 1)
    assert groups_of(labels) == [[0, 1], [2] * 4 + [3] * 4 + [4] * 4]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.one, self.other = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.turned = nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        h = self.first(x).relu()
        return self.one(h) + self.other(h) + h @ self.turned


def test_all_readers_of_a_unit_are_one_group():
    labels = reader_labels(Two(), torch.randn(2, 3))
    assert groups_of(labels) == [[0, 1, 2, 3]] * 3
    assert labels["turned"].shape == (4, 1) and labels["one.weight"].shape == (1, 4)


class Other(Two):
    def forward(self, x):
        h = self.first(x).relu()
        return self.one(h) + (h * h.flip(0)).sum(1, keepdim=True)


def test_units_that_something_else_reads_are_in_no_group():
    with pytest.raises(bmr.errors.ShrinkError, match="no hidden unit that can be removed"):
        reader_labels(Other(), torch.randn(2, 3))
    with pytest.raises(bmr.errors.ShrinkError, match="no hidden unit"):
        reader_labels(nn.Linear(3, 2), torch.randn(2, 3))


class Made(nn.Module):
    """Weights that are computed, constant, transposed, or used in two ways."""

    def __init__(self, how):
        super().__init__()
        self.first, self.one, self.how = nn.Linear(3, 4), nn.Linear(4, 2), how
        self.w = nn.Parameter(torch.randn(2, 4))
        self.register_buffer("fixed", torch.randn(2, 4))

    def forward(self, x):
        h = self.first(x).relu()
        if self.how == "twice":
            return nn.functional.linear(self.one(h).relu(), self.one.weight.T)
        made = {"computed": lambda: self.w + 1, "fixed": lambda: self.fixed, "own": lambda: self.w}
        return self.one(h) + nn.functional.linear(h, made[self.how]())


@pytest.mark.parametrize("how", ["computed", "fixed", "twice"])
def test_units_that_a_computed_or_constant_weight_reads_are_in_no_group(how):
    with pytest.raises(bmr.errors.ShrinkError, match="no hidden unit"):
        reader_labels(Made(how), torch.randn(2, 3))
    assert groups_of(reader_labels(Made("own"), torch.randn(2, 3))) == [[0, 1, 2, 3]] * 2


def test_of_shared_and_of_parametrised_weights():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[4].weight = net[2].weight
    with pytest.raises(bmr.errors.ShrinkError, match="no hidden unit"):
        reader_labels(net, torch.randn(2, 3))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), normed)
    assert groups_of(reader_labels(net, torch.randn(2, 3))) == [[0, 1, 2, 3]]


@pytest.mark.slow
def test_of_a_transformer_the_hidden_units_are_read():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 6, 0.0, batch_first=True, norm_first=True)
    net = nn.Sequential(nn.Linear(3, 8), layer, nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    labels = reader_labels(net, torch.randn(2, 5, 3))
    assert groups_of(labels) == [list(range(6))] and list(labels) == ["1.linear2.weight"]


def test_prune_by_readers_and_shrink():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(200, 6)
    labels = reader_labels(net, x)
    pruned = bmr.prune(
        net, x, bmr.Categorical(), 0.3, per=labels, path=(0.6,), corrections=1,
        last_corrections=1, progress=False,
    )  # fmt: skip
    small = bmr.shrink(pruned.net, pruned.masks, x)
    torch.testing.assert_close(small(x), pruned.net(x), rtol=1e-4, atol=1e-5)
    mask = pruned.masks["2.weight"]
    assert torch.equal(mask, mask[:1].expand_as(mask)) and bool(pruned.masks["0.weight"].all())
    assert small[0].out_features == int(mask[0].sum())
    assert small[2].out_features == int(pruned.masks["4.weight"][0].sum())
    kept = sum(int(pruned.masks[n].sum()) for n in labels) / (12 * 8 + 8 * 3)
    assert 0.3 <= kept < 0.4


def test_a_layer_keeps_a_unit_whatever_the_fraction():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3))
    net[2].weight.data *= 1e-3  # says nothing
    x = torch.randn(100, 6)
    pruned = bmr.prune(
        net, x, bmr.Categorical(), 0.02, per=reader_labels(net, x), path=(), corrections=0,
        last_corrections=0, progress=False,
    )  # fmt: skip
    assert all(int(mask[0].sum()) >= 1 for mask in pruned.masks.values())


@pytest.mark.parametrize("call", [reader_labels, lambda net, x: bmr.shrink(net, {}, x)])
def test_what_is_no_plain_network_or_no_row_of_it_is_refused(call):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for given in (bmr.BayesianNetwork(net, bmr.Gaussian(), bmr.Categorical()), "net"):
        with pytest.raises(bmr.errors.ShrinkError, match=r"expected a plain torch\.nn\.Module"):
            call(given, torch.randn(2, 3))
    for rows in (torch.zeros(0, 3), 5):
        with pytest.raises(bmr.errors.ShrinkError, match="expected rows of the network's input"):
            call(net, rows)
    with pytest.raises(bmr.errors.ShrinkError, match="does not run on two rows"):
        call(net, torch.randn(2, 7))


def three_layers(hidden=12):
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    return net, torch.randn(60, 6)


QUICK = {"path": (), "corrections": 0, "last_corrections": 0, "progress": False}


def test_groups_of_layers_that_are_not_pruned_are_kept():
    net, x = three_layers()
    labels = reader_labels(net, x)
    with pytest.warns(bmr.errors.PyroBMRWarning, match=r"4\.weight cannot be pruned here"):
        pruned = bmr.prune(net, x, bmr.Categorical(), 0.5, per=labels, only=["2.weight"], **QUICK)
    assert int(pruned.masks["2.weight"][0].sum()) == 6 and list(pruned.masks) == ["2.weight"]
    both = {**labels, "4.weight": torch.arange(4, 12).view(1, 8)}  # the last units are one group
    with pytest.warns(bmr.errors.PyroBMRWarning):
        pruned = bmr.prune(net, x, bmr.Categorical(), 0.5, per=both, only=["2.weight"], **QUICK)
    assert bool(pruned.masks["2.weight"][:, 4:].all())
    with pytest.raises(bmr.errors.ReductionError, match="there is no reduced site 'five'"):
        bmr.prune(net, x, bmr.Categorical(), 0.5, per={"five": torch.zeros(1, 1).long()}, **QUICK)


def test_the_fraction_is_met_and_nothing_in_no_group_is_pruned():
    net, x = three_layers()
    one = {"2.weight": torch.arange(12).view(1, 12)}
    for left in (1, 3, 7, 11):
        pruned = bmr.prune(net, x, bmr.Categorical(), left / 12, per=one, **QUICK)
        assert int(pruned.masks["2.weight"][0].sum()) == left
    none = {"2.weight": torch.tensor([[-1]])}
    with pytest.raises(bmr.errors.ReductionError, match="no group of the weights"):
        bmr.prune(net, x, bmr.Categorical(), 0.5, per=none, **QUICK)
    layers = bmr.prune(net, x, bmr.Categorical(), 0.1, per="layer", **QUICK)
    assert layers.kept < 1  # a layer that is one group is not kept by the floor


@pytest.mark.slow
def test_a_checkpoint_of_other_labels_is_refused(tmp_path):
    net, x = three_layers(1200)
    labels = reader_labels(net, x)
    bmr.prune(net, x, bmr.Categorical(), 0.5, per=labels, checkpoint=tmp_path, **QUICK)
    other = {**labels, "2.weight": labels["2.weight"].clone()}
    other["2.weight"][:, 600:620] = -1
    with pytest.raises(bmr.errors.ModelError, match="of other arguments"):
        bmr.prune(net, x, bmr.Categorical(), 0.5, per=other, checkpoint=tmp_path, **QUICK)


def test_what_tells_calls_apart_does_not_depend_on_the_order_of_names():
    """The order of a set of names differs between processes."""
    label, heads = torch.tensor([0, 1]), {"a": 2, "b": 4}
    calls = [
        {"per": {"x": label, "y": label + 2}, "heads": heads, "kept": 0.5},
        {"kept": 0.5, "heads": dict(reversed(heads.items())), "per": {"y": label + 2, "x": label}},
        {"per": {"x": label + 2, "y": label}, "heads": heads, "kept": 0.5},
    ]
    one, same, other = (about_call({"w": torch.ones(2)}, call) for call in calls)
    assert one == same != other


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", sorted(KINDS.keys() - NONE))
def test_units_that_are_not_read_are_removed(name):
    torch.manual_seed(0)
    net, x = KINDS[name]()
    net.eval()
    labels = reader_labels(net, x)
    count = 1 + max(int(one.max()) for one in labels.values())
    gone = torch.randperm(count)[: max(count // 2, 1)]
    masks = {
        n: ~torch.isin(one, gone).expand(net.get_parameter(n).shape) for n, one in labels.items()
    }
    small = bmr.shrink(net, masks, x)
    zeros = {n: int((small.get_parameter(n) == 0).sum()) for n in masks}
    assert name in COUPLED or not any(zeros.values()), zeros
    assert parameters(small) < parameters(net) or name == "maxout_and_highway"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NONE))
def test_networks_without_such_units_are_refused(name):
    net, x = KINDS[name]()
    with pytest.raises(bmr.errors.ShrinkError, match="no hidden unit"):
        reader_labels(net.eval(), x)


def parameters(net):
    return sum(p.numel() for p in net.parameters())
