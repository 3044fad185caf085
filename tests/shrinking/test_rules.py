"""The rules of the operations: what they say is constant is constant, and the page lists them."""

import re
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import pyro_bmr as bmr
from pyro_bmr.data.inputs import call_arguments
from pyro_bmr.shrinking import contractions, masked, movement, rules
from pyro_bmr.shrinking.analysis import Analysis
from pyro_bmr.shrinking.exported_graph import exported, two_rows
from pyro_bmr.shrinking.states import State
from pyro_bmr.shrinking.untied import untied
from pyro_bmr.shrinking.verification import inputs_like
from tests.parameters import others_slow
from tests.shrinking.kinds import KINDS, Forward
from tests.shrinking.test_kinds import built, unit_masks

PAGE = Path(__file__).parents[2] / "docs" / "smaller_networks.md"


def values_at(graph, net, x):
    """The value of each operation of the whole graph on x."""
    given, named = call_arguments(net, x)
    arguments = dict(zip(graph.arguments, (*given, *named.values()), strict=True))
    seen = {node: tensor.detach() for node, (_, tensor) in graph.tensors.items()}
    for node, (argument, keys) in graph.inputs.items():
        seen[node] = arguments[argument]
        for key in keys:
            seen[node] = seen[node][key]
    for node in graph.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: seen[n])
            seen[node] = node.target(*args, **kwargs)
    return seen


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize(
    "name", others_slow(list(KINDS)[1:], "bags_of_embeddings", "squeeze_and_excitation")
)
def test_what_is_known_of_a_tensor_does_not_depend_on_the_input(name):
    net, example = built(name, 5, True)
    # the biases are kept: constants other than 0
    masks = {k: m for k, m in unit_masks(net, 0.6, 5).items() if m.ndim > 1}
    net, _ = untied(masked(net, masks))
    graph = exported(net, two_rows(example))
    analysis = Analysis(graph, {})
    known = 0
    with torch.no_grad():
        for x in [two_rows(example), *inputs_like(example, net)[1:]]:
            values = values_at(graph, net, x)
            for node, state in analysis.states.items():
                if node in analysis.depends and isinstance(state, State):
                    here = ~state.unknown
                    got, said = values[node][here] * 1.0, state.value[here] * 1.0
                    torch.testing.assert_close(got, said, rtol=0, atol=1e-12, msg=node.name)
                    known += int(here.sum())
    assert known > 0


OVER_TIME = {  # and whether a constant gives the same number at any length
    "fft": (lambda h: torch.fft.irfft(torch.fft.rfft(h), n=h.shape[-1]).mean(-1), False),
    "cumsum": (lambda h: h.cumsum(-1).mean(-1), False),
    "norm": (lambda h: h.norm(dim=-1), False),
    "logsumexp": (lambda h: h.logsumexp(-1), False),
    "prod": (lambda h: h.prod(-1), False),
    "amax": (lambda h: h.amax(-1), True),
    "min": (lambda h: h.min(-1)[0], True),
    "std": (lambda h: h.std(-1), True),
}


@pytest.mark.parametrize("name", OVER_TIME)
@pytest.mark.parametrize("constant", others_slow([0.0, 0.7], 0.7))
def test_constants_over_an_open_length_are_those_of_any_length(name, constant):
    over_time, same = OVER_TIME[name]
    torch.manual_seed(2)
    net = Forward(
        lambda net, x: net.out(over_time(net.a(x).transpose(1, 2))),
        a=nn.Linear(2, 8),
        out=nn.Linear(8, 3),
    ).double()
    with torch.no_grad():
        net.a.bias[:5] = constant
    rows = (torch.arange(8) >= 5)[:, None].expand(8, 2)
    x, longer = torch.randn(2, 6, 2).double(), torch.randn(2, 11, 2).double()
    small = bmr.shrink(net, {"a.weight": rows}, x)
    want = masked(net, {"a.weight": rows})(longer)
    torch.testing.assert_close(small(longer), want, rtol=0, atol=1e-12)
    zeros = constant == 0 and name not in ("logsumexp", "prod")
    assert len(small.a.weight) == (3 if same or zeros else 8)


def test_the_page_lists_the_operations():
    text = PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([a-z ]+) \| ([^|`]+) \|$", text, re.M))
    rows.pop("operations", None)
    assert rows == rules.OPERATIONS


def test_the_operations_of_the_page_have_rules():
    for group in ("products and sums", "norms", "moved"):
        for name in rules.OPERATIONS[group].split(", "):
            assert (
                name in rules._READS
                or name in rules._SPECIAL
                or name in movement.MOVES
                or rules._CONVOLUTIONS.fullmatch(name)
                or name in ("layer_norm", "rms_norm", "group_norm", "instance_norm")
            ), name
            assert hasattr(torch.ops.aten, name)


def test_a_read_needs_what_kept_outputs_read():
    table = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0]]).bool().numpy()
    foldable = torch.tensor([False, False, True, False]).numpy()
    read = contractions.Read(None, "", torch.arange(4).numpy(), [(table, None)], foldable)
    kept = torch.tensor([True, False, True]).numpy()
    assert read.needed(lambda ids: kept).tolist() == [True, False, False, False]


def by_hand(kept, groups):
    """What is left of `kept` if every group that keeps anything keeps as many as the largest."""
    left = kept.view(groups, -1).clone()
    most = int(left.sum(1).max())
    for row in left:
        if row.any():
            row[(~row).nonzero()[: most - int(row.sum()), 0]] = True
    return left.flatten()


@pytest.mark.parametrize("transposed", others_slow([False, True], True))
@pytest.mark.parametrize(
    "kept",
    ["10 01 10 01", "10 01 00 11", "101 010 011 000", "00 00 00 01"],
    ids=lambda k: k.replace(" ", "-"),
)
def test_groups_keep_as_many_channels_at_places_of_their_own(kept, transposed):
    """The channels that the weight has a position for each of: outputs, transposed inputs."""
    places = torch.tensor([c == "1" for c in kept.replace(" ", "")])
    groups, size = kept.count(" ") + 1, len(kept.split()[0])
    torch.manual_seed(2)
    if transposed:
        layer = nn.ConvTranspose1d(groups * size, 2 * groups, 2, groups=groups, bias=False)
    else:
        layer = nn.Conv1d(2 * groups, groups * size, 2, groups=groups)
    net = nn.Sequential(
        nn.Conv1d(3, layer.in_channels, 1), nn.ReLU(), layer, nn.ReLU(),
        nn.Conv1d(layer.out_channels, 2, 1),
    ).eval()  # fmt: skip
    names = ("0.weight", "0.bias") if transposed else ("2.weight", "2.bias")
    masks = {
        n: places.view(-1, *[1] * (net.get_parameter(n).ndim - 1)).expand_as(net.get_parameter(n))
        for n in names
    }
    x = torch.randn(2, 3, 6)
    small = bmr.shrink(net, masks, x)
    torch.testing.assert_close(small(x), masked(net, masks)(x), rtol=1e-5, atol=1e-6)
    left = by_hand(places, groups)
    of = small[2].in_channels if transposed else small[2].out_channels
    assert of == int(left.sum())
    assert small[2].groups == int(left.view(groups, -1).any(1).sum())


PLACES = torch.tensor([0, 1])


def two_of(a):
    """(channels, 2, rows, places)"""
    return torch.stack([a.transpose(0, 1)] * 2, 1)


PICKED = {
    "two axes apart": (lambda a, n: a[torch.arange(len(a)), :, n], True),
    "two axes together": (lambda a, n: a.mT[torch.arange(len(a)), n], True),
    "two later axes apart": (lambda a, n: two_of(a)[:, PLACES, :, PLACES].sum(0).T, True),
    "along the last": (lambda a, n: a[..., torch.tensor([2, 0])].flatten(2).mean(2), True),
    "one place": (lambda a, n: a[:, :, torch.tensor(1)], True),
    "selected": (lambda a, n: a.index_select(-1, torch.tensor([2, 2])).sum(-1), True),
    "channels": (lambda a, n: a.mean(2)[:, torch.arange(7, -1, -1)], False),
}


@pytest.mark.parametrize("constant", others_slow([0.0, 0.5], 0.5))
@pytest.mark.parametrize("case", PICKED)
def test_entries_that_are_picked_by_number_keep_the_channels_of_other_axes(case, constant):
    """A channel that is constant in all places stays so; one that differs between them does not."""
    pick, smaller = PICKED[case]

    class Picked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Conv1d(4, 8, 1), torch.nn.Linear(8, 3)
            self.places = torch.nn.Parameter(torch.randn(8, 3))

        def forward(self, x, n):
            return self.b(pick(torch.tanh(self.a(x)) * self.places, n))

    torch.manual_seed(0)
    net = Picked().double()
    with torch.no_grad():
        net.a.weight[:5], net.a.bias[:5] = 0, 0
        net.a.bias[3:5] = constant
        net.places[3] = 1.0
    x, n = torch.randn(3, 4, 3).double(), torch.tensor([0, 2, 1])
    small = bmr.shrink(net, {}, {"x": x, "n": n})
    other, m = torch.randn(3, 4, 3).double(), torch.tensor([2, 2, 0])
    torch.testing.assert_close(small(other, m), net(other, m), rtol=0, atol=1e-12)
    assert (len(small.a.weight) < 8) == smaller
