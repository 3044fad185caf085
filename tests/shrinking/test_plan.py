"""What a plan shows, and the networks and masks that are refused."""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from tests.shrinking.networks import NETS, Three, made, random_masks


def test_the_plan_says_what_is_pruned_and_changes_nothing(digits):
    net = made(NETS["lenet"], 5)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    masks = random_masks(net, 0.0, "rows", 0)
    masks["4.weight"][:4] = False  # four of six channels of 25 positions each
    masks["4.bias"][:4] = False
    plan = bmr.shrinking.shrink_plan(net, masks, digits[:1])
    table = plan.layers.set_index("layer")
    assert table.loc[
        "4", ["before", "after", "parameters before", "parameters after"]
    ].tolist() == ["6×4×5×5", "2×4×5×5", 606, 202]
    assert table.loc["8", ["before", "after", "parameters after"]].tolist() == [
        "14×150",
        "14×50",
        14 * 51,
    ]
    assert table.loc["4", "FLOPs before"] == 2 * 6 * 4 * 25 * 100
    assert table.loc["8", "FLOPs after"] == 2 * 14 * 50
    assert plan.parameters[0] - plan.parameters[1] == 404 + 14 * 100
    assert "14×150" in str(plan) and "57.6% removed" in str(plan)
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())


def test_inputs_that_are_not_read():
    net = made(NETS["mlp"], 0)
    masks = {"1.weight": torch.ones(20, 64, dtype=torch.bool)}
    masks["1.weight"][:, [0, 7, 63]] = False
    masks["1.weight"][:5, 9], masks["3.weight"] = False, torch.ones(15, 20, dtype=torch.bool)
    masks["3.weight"][:, 5:] = False  # of the units that read input 9, none is read
    plan = bmr.shrinking.shrink_plan(net, masks, torch.zeros(1, 1, 8, 8).double())
    assert plan.unread_inputs.tolist() == [0, 7, 9, 63] and "inputs no longer read: 4" in str(plan)
    convolution = bmr.shrinking.shrink_plan(
        made(NETS["lenet"], 0), {}, torch.zeros(1, 1, 8, 8).double()
    )
    assert convolution.unread_inputs.tolist() == []


@pytest.mark.parametrize(
    ("name", "layer", "why"),
    [
        pytest.param("vit", "encoder.layers.0.norm1", "kept together", marks=pytest.mark.slow),
    ],
)
def test_what_is_kept_is_named(name, layer, why):
    plan = bmr.shrinking.shrink_plan(made(NETS[name], 0), {}, torch.zeros(1, 1, 8, 8).double())
    assert why in plan.kept[layer] and f"kept: {layer}: " in str(plan)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


REFUSED = {
    "control flow": (Branching, r"Branching cannot be traced.*masked network"),
    "a forward that raises": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LSTMCell(4, 3), Branching()),
        r"does not run on two rows of the example",
    ),
    "wrong input": (
        lambda: nn.Linear(5, 4),
        r"does not run on two rows of the example, of shape \(2, 4\)",
    ),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_have_names(build, message):
    with pytest.raises(bmr.errors.ShrinkError, match=message):
        bmr.shrinking.shrink_plan(build(), {}, torch.randn(3, 4))


MASKS = {
    "name": (
        {"7.weight": torch.ones(3, 4, dtype=torch.bool)},
        r"mask '7\.weight': expected the name of a parameter of the network.*0\.weight",
    ),
    "shape": (
        {"0.weight": torch.ones(4, 3, dtype=torch.bool)},
        r"mask '0\.weight': expected a bool .*\(3, 4\), got a bool tensor of shape \(4, 3\)",
    ),
    "dtype": ({"0.weight": torch.ones(3, 4)}, r"got a float32 tensor of shape \(3, 4\)"),
    "no tensor": ({"0.bias": [True] * 3}, r"got \[True, True, True\]"),
}


@pytest.mark.parametrize(("masks", "message"), MASKS.values(), ids=MASKS)
def test_masks_that_do_not_fit(masks, message):
    net = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(bmr.errors.ShrinkError, match=message):
        bmr.shrink(net, masks, torch.randn(3, 4))
    with pytest.raises(bmr.errors.ShrinkError, match="example: expected rows"):
        bmr.shrink(net, {}, torch.empty(0, 4))


class TwoInputs(nn.Module):
    def forward(self, x, z):
        return x + z


def test_a_foreign_error_becomes_one_of_the_library(monkeypatch):
    def broken(*args, **kwargs):
        raise IndexError("of the analysis")

    net = made(lambda: Three(lambda net, h, x: net.c(h)), 0)
    x = torch.randn(5, 6).double()
    for name in ("analysis.state_after", "contractions._read"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pyro_bmr.shrinking.{name}", broken)
            with pytest.raises(
                bmr.errors.ShrinkError,
                match=(
                    r"'linear' \(aten.linear.default\) cannot be read \(IndexError: of the"
                    r" analysis\).*`export`"
                ),
            ):
                bmr.shrink(net, {}, x)
    with pytest.raises(
        bmr.errors.ShrinkError,
        match=r"does not run on two rows of the example, of shape \(2, 6\).*argument: 'z'",
    ):
        bmr.shrink(TwoInputs(), {}, x)
    with pytest.raises(
        bmr.errors.ShrinkError, match=r"does not run .* \[0\] \(2, 6\) torch.float64, \[1\]"
    ):
        bmr.shrink(net, {}, (x, x))


def test_latency_before_and_after():
    """The masked network does all products, the smaller one a hundredth of them."""
    net = nn.Sequential(nn.Linear(400, 2000), nn.ReLU(), nn.Linear(2000, 400))
    masks = {"0.weight": (torch.arange(2000)[:, None] < 10).expand(2000, 400)}
    masks["0.bias"] = masks["0.weight"][:, 0]
    x = torch.randn(7, 400)
    table = bmr.shrinking.shrink_plan(net, masks, x).latency(x, batches=(1, 64), seconds=0.04)
    assert table["batch"].tolist() == [1, 64]
    assert torch.allclose(
        torch.tensor(table["ratio"]), torch.tensor(table["ms after"] / table["ms before"])
    )
    assert (table["ms before"] > 0).all() and table["ratio"].iloc[1] < 1
