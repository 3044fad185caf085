"""Recurrent layers: units that stay 0, or that nothing reads, are removed from all gates."""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.shrinking import masked
from tests.parameters import others_slow
from tests.shrinking.kinds import Forward

CELLS = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
READERS = {  # what the network reads: outputs y and last states h; and how wide that is
    "outputs": (lambda y, h: y.mean(1), lambda layers, both: 6 * (1 + both)),
    "the last layer": (lambda y, h: h[-1], lambda layers, both: 6),
    "all layers": (
        lambda y, h: h.transpose(0, 1).flatten(1),
        lambda layers, both: 6 * layers * (1 + both),
    ),
}


def network(kind, reader="outputs", layers=1, both=False, **options):
    torch.manual_seed(1)
    read, width = READERS[reader]

    def function(net, x):
        y, h = net.cell(torch.tanh(net.i(x)))
        return net.out(torch.relu(net.h(read(y, h[0] if isinstance(h, tuple) else h))))

    return Forward(
        function, i=nn.Linear(4, 5),
        cell=kind(5, 6, layers, bidirectional=both, batch_first=True, **options),
        h=nn.Linear(width(layers, both), 7), out=nn.Linear(7, 2),
    ).double()  # fmt: skip


def masks_of_units(net, kind, kept):
    """Masks without the rows of all units but `kept`, which has a list for each suffix of names."""
    masks = {}
    for name, p in net.cell.named_parameters():
        units = torch.zeros(6, dtype=torch.bool)
        units[kept[name.partition("_l")[2]]] = True
        masks[f"cell.{name}"] = units.repeat(CELLS[kind]).view(-1, *[1] * (p.ndim - 1)).expand_as(p)
    return masks


def checked(net, masks, kept):
    """The plan, after a comparison of both networks at another length and number of rows."""
    plan = bmr.shrinking.shrink_plan(net, masks, torch.randn(2, 3, 4).double())
    small, x = plan.apply(), torch.randn(5, 8, 4).double()
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(net, masks)(x), rtol=0, atol=1e-14)
    cell = small.get_submodule("cell")
    assert cell.hidden_size == cell.weight_hh_l0.shape[1] == kept
    assert len(cell.weight_ih_l0) == len(cell.weight_hh_l0) == CELLS[type(cell)] * kept
    return plan


@pytest.mark.parametrize(
    ("kind", "reader"),
    [
        (nn.GRU, "outputs"),
        *(
            pytest.param(kind, reader, marks=pytest.mark.slow)
            for kind in CELLS
            for reader in READERS
            if (kind, reader) != (nn.GRU, "outputs")
        ),
    ],
)
def test_units_without_rows_are_removed(kind, reader):
    checked(network(kind, reader), masks_of_units(network(kind), kind, {"0": [1, 4]}), 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reader", "kept"),
    [
        ("the last layer", 3),
        ("outputs", 3),
        ("all layers", 5),
    ],
)
def test_layers_and_directions_keep_as_many_units(reader, kept):
    # of other places: where the last states are read together, only unit 5 is 0 in all of them
    places = {"0": [0, 1], "0_reverse": [1, 2, 3], "1": [4], "1_reverse": [0, 4]}
    net = network(nn.LSTM, reader, layers=2, both=True)
    plan = checked(net, masks_of_units(net, nn.LSTM, places), kept)
    assert plan.own_class and plan.apply().cell.weight_ih_l1.shape == (4 * kept, 2 * kept)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_unit_is_0_without_its_candidate_alone(kind):
    net, masks = network(kind), {}
    for name, p in net.cell.named_parameters():
        masks[f"cell.{name}"] = torch.ones_like(p, dtype=torch.bool)
        masks[f"cell.{name}"].unflatten(0, (-1, 6))[2, [0, 3]] = False  # g of an LSTM, n of a GRU
    checked(net, masks, 4)
    masks["cell.bias_hh_l0"][2 * 6] = True  # tanh of a bias
    checked(net, masks, 5)


@pytest.mark.slow
def test_a_unit_that_nothing_reads_is_removed():
    net = network(nn.LSTM)
    masks = {"h.weight": torch.ones(7, 6).bool(), "cell.weight_hh_l0": torch.ones(24, 6).bool()}
    for mask in masks.values():
        mask[:, 2] = False
    checked(net, masks, 5)


@pytest.mark.slow
def test_inputs_that_only_removed_units_read_are_removed():
    net = network(nn.GRU)
    masks = masks_of_units(net, nn.GRU, {"0": [1, 4]})
    reads = torch.zeros(3, 6, 5, dtype=torch.bool)
    reads[:, 1, :2] = reads[:, 4, 1:3] = reads[:, 0, 3] = True
    masks["cell.weight_ih_l0"] = reads.view(18, 5)
    plan = checked(net, masks, 3)  # unit 0 is live; the others read it
    assert plan.apply().i.out_features == plan.apply().cell.input_size == 4


@pytest.mark.slow
def test_a_state_that_is_given_keeps_its_units():
    def function(net, x):
        start = net.start.expand(-1, x.shape[0], -1).contiguous()
        return net.out(net.cell(x, start)[0][:, -1])

    start = torch.zeros(1, 1, 6)
    start[0, 0, 2] = 0.5
    net = Forward(
        function, start=nn.Parameter(start), cell=nn.GRU(4, 6, batch_first=True),
        out=nn.Linear(6, 3),
    ).double()  # fmt: skip
    masks = masks_of_units(net, nn.GRU, {"0": [1]})
    plan = checked(net, masks, 2)
    assert plan.apply().start.flatten().tolist() == [0, 0.5]


@pytest.mark.slow
def test_a_graph_calls_the_smaller_layer():
    net = network(nn.LSTM)
    masks = masks_of_units(net, nn.LSTM, {"0": [1, 4]})
    masks["h.weight"] = torch.zeros(7, 6).bool()
    masks["h.weight"][:3] = True
    net.function = lambda net, x: net.out(torch.relu(net.h(net.cell(net.i(x))[0][:, -1])) / 6)
    masks["i.weight"] = torch.zeros(5, 4).bool()  # constant inputs of the layer: no longer its own
    plan = bmr.shrinking.shrink_plan(net, masks, torch.randn(2, 3, 4).double())
    assert not plan.own_class and plan.apply().cell.hidden_size == 2


@pytest.mark.slow
def test_a_layer_with_projected_outputs_is_kept():
    net = nn.Sequential(
        nn.LSTM(3, 4, proj_size=2), Forward(lambda net, y: net.h(y[0]), h=nn.Linear(2, 3))
    )
    plan = bmr.shrinking.shrink_plan(
        net, {"0.weight_ih_l0": torch.zeros(16, 3).bool()}, torch.randn(2, 5, 3)
    )
    why = "the units of this LSTM are kept"
    assert plan.kept["0"] == why and f"kept: 0: {why}" in str(plan)
    assert plan.apply()[0].weight_hh_l0.shape == (16, 2)


def test_what_a_unit_of_a_recurrent_layer_is():
    torch.manual_seed(0)
    net = network(nn.LSTM, layers=2)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    labels = bmr.reduction.groups.group_labels(shapes, "unit")
    for layer in (0, 1):
        names = [f"cell.{n}_l{layer}" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        first = labels[names[3]][:6]
        assert len(set(first.tolist())) == 6
        for name in names:
            assert labels[name].shape == shapes[name]
            rows = labels[name].reshape(4, 6, -1)
            assert (rows == first.view(1, 6, 1)).all()
    assert len({int(n) for label in labels.values() for n in label.unique()}) == 5 + 12 + 7 + 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_bmr.errors.PyroBMRWarning")  # more weights than rows
def test_a_reduction_by_unit_makes_it_smaller():
    net, x = network(nn.GRU).float(), torch.randn(20, 3, 4)
    program = bmr.BayesianNetwork(net, bmr.Gaussian(1.0), bmr.Normal(noise=0.5))
    posterior = bmr.fit(program, (x, torch.randn(20, 2)), epochs=1, progress=False).posterior
    kept = {"cell.*": 0.5}
    reduction = bmr.reduce(posterior, to=bmr.Gaussian(scale=0), per="unit", kept=kept)
    small = bmr.shrink(bmr.export(program, reduction.posterior), reduction.masks, x)
    assert small.cell.hidden_size == 3


STEPS = {  # which steps of a sequence the network reads, for sequences of other lengths
    "a step of each": lambda y, n: y[torch.arange(y.shape[0]), n - 1],
    "two steps of each": lambda y, n: y[
        torch.arange(y.shape[0])[:, None], torch.stack([n - 1, 0 * n], 1)
    ].sum(1),
    "known steps": lambda y, n: y[:, torch.tensor([0, 2, -1])].mean(1),
    "selected steps": lambda y, n: y.index_select(1, torch.tensor([0, 2])).mean(1),
    "gathered": lambda y, n: y.gather(1, (n - 1)[:, None, None].expand(-1, 1, 6)).squeeze(1),
    "units by number": lambda y, n: y.mean(1)[:, torch.tensor([5, 4, 3, 2, 1, 0])],
}  # fmt: skip


class OfSteps(nn.Module):
    def __init__(self, kind, step):
        super().__init__()
        self.cell, self.out, self.step = kind(4, 6, batch_first=True), nn.Linear(6, 2), STEPS[step]

    def forward(self, x, lengths):
        return self.out(torch.tanh(self.step(self.cell(x)[0], lengths)))


@pytest.mark.parametrize("kind", others_slow([nn.LSTM, nn.GRU], nn.LSTM))
@pytest.mark.parametrize("step", others_slow(STEPS, "selected steps", "units by number"))
def test_steps_that_are_picked_by_number_leave_the_units_alone(kind, step):
    torch.manual_seed(2)
    net = OfSteps(kind, step).double()
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters()}
    for name in ("out.weight", "cell.weight_hh_l0"):
        masks[name][:, [0, 2, 3]] = False
    rows = {"x": torch.randn(3, 5, 4), "lengths": torch.tensor([5, 2, 3])}
    plan = bmr.shrinking.shrink_plan(net, masks, rows)
    small = plan.apply()
    x, lengths = torch.randn(5, 8, 4).double(), torch.tensor([1, 8, 3, 4, 7])
    want = masked(net, masks)(x, lengths)
    torch.testing.assert_close(small(x, lengths), want, rtol=0, atol=1e-14)
    kept = {"gathered": "'gather' in forward", "units by number": "picked by their numbers"}
    if step in kept:
        assert small.cell.hidden_size == 6
        assert (
            plan.kept["cell"].startswith("its units are kept: ") and kept[step] in plan.kept["cell"]
        )
    else:
        assert small.cell.hidden_size == 3 and not plan.kept
