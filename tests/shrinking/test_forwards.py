"""Forwards that are shrunk: sizes in them, layers that are used twice, arguments with defaults."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import pyro_bmr as bmr
from pyro_bmr.exporting.written_files import loaded_module
from pyro_bmr.shrinking import masked
from tests.parameters import others_slow
from tests.shrinking.networks import Three, check, every_other, made

# name → (forward of three layers 6 → 16 → 16 → 3, parameters that are left of 435 when every other
# unit of the first is pruned)
FORWARDS = {}


def forward(left):
    def entered(function):
        FORWARDS[function.__name__] = (function, left)
        return function

    return entered


@forward(83)
def over_its_width(net, h, x):
    return net.c(h / h.shape[1])


@forward(83)
def over_the_root_of_its_width(net, h, x):
    return net.c(h * h.size(-1) ** -0.5)


@forward(83)
def over_all_its_entries(net, h, x):
    return net.c(h / h.numel())


@forward(83)
def entries_per_row(net, h, x):
    return net.c(h * (h.numel() / h.size(0)))


@forward(83)
def the_shape_taken_apart(net, h, x):
    n, width = h.shape
    return net.c(h.view(n, width) / (width - n + n))


@forward(91)
def a_gain_expanded_to_a_number(net, h, x):
    return net.c(h * net.g.expand(x.size(0), 16))


@forward(83)
def a_view_of_a_number(net, h, x):
    return net.c(h.view(-1, 16))


@forward(163)
def a_mean_written_out(net, h, x):
    return net.c(h - h.sum(1, keepdim=True) / h.shape[1])


@forward(83)
def groups_of_a_width(net, h, x):
    return net.c(h.reshape(h.shape[0], h.shape[1] // 2, 2).reshape(h.shape))


@forward(91)
def a_gain_used_twice(net, h, x):
    return net.c(h * net.g) + net.c(torch.tanh(net.a(-x)) * net.g)


@forward(83)
def not_contiguous(net, h, x):
    return net.c(h.view(-1, 4, 4).transpose(1, 2).contiguous().view(x.size(0), 16))


@forward(None)
def rows_and_the_rest(net, h, x):
    return net.c(
        h.unflatten(1, (16, 1)).expand(-1, -1, 3).transpose(1, 2).reshape(h.shape[0], 3, h.shape[1])
    ).mean(1)


@pytest.mark.parametrize(
    "name",
    others_slow(
        FORWARDS,
        *("over_its_width", "over_all_its_entries", "the_shape_taken_apart", "a_gain_used_twice"),
        *("a_mean_written_out", "groups_of_a_width"),
    ),
)
def test_sizes_in_a_forward(name):
    function, left = FORWARDS[name]
    net = made(lambda: Three(function), 1)
    check(net, every_other(net, "a"), torch.randn(5, 6).double(), left)


def test_sizes_of_a_layer_that_has_become_a_constant():
    net = made(lambda: Three(lambda net, h, x: net.c(h / h.shape[1]) + x[:, :3]), 0)
    masks = {"a.weight": torch.zeros(16, 6, dtype=torch.bool)}
    check(net, masks, torch.randn(5, 6).double(), 3)


def test_other_lengths_of_a_sequence_are_possible():
    net = made(
        lambda: Three(
            lambda net, h, x: net.c(h.view(x.size(0), x.size(1), -1) * h.size(-1) ** -0.5).mean(1)
        ),
        0,
    )
    small = check(net, masks := every_other(net, "a"), torch.randn(3, 5, 6).double(), 83)
    other = torch.randn(2, 9, 6).double()
    torch.testing.assert_close(small(other), masked(net, masks)(other), rtol=0, atol=1e-12)


def test_a_shared_activation_is_applied_each_time():
    act = nn.Tanh()
    net = made(
        lambda: nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 3)), 0
    )
    check(net, every_other(net, "0"), torch.randn(5, 6).double(), 4 * 7 + 8 * 5 + 27)


class Twins(nn.Module):
    """An encoder for two inputs, with norms and slopes of its own."""

    def __init__(self, cut="norm"):
        super().__init__()
        self.e = nn.Sequential(
            nn.Linear(6, 24), nn.BatchNorm1d(24), nn.PReLU(24), nn.Linear(24, 12)
        )
        self.h = nn.Linear(12, 3)

    def forward(self, x):
        return self.h((self.e(x[:, 0]) - self.e(x[:, 1])).abs())


def test_a_layer_that_is_used_twice():
    net = made(Twins, 0)
    masks = every_other(net, "e.0")
    x = torch.randn(5, 2, 6).double()
    small = check(net, masks, x)
    sizes = [tuple(small.get_submodule(f"e.{k}").weight.shape) for k in range(4)]
    assert sizes == [(12, 6), (12,), (12,), (12, 12)]
    table = bmr.shrinking.shrink_plan(net, masks, x).layers.set_index("layer")
    assert table.loc["e.0", ["before", "after", "FLOPs before"]].tolist() == [
        "24×6",
        "12×6",
        2 * 2 * 24 * 6,
    ]
    assert table["parameters after"].sum() == sum(p.numel() for p in small.parameters())


def test_a_constant_that_differs_between_the_uses_of_a_layer_is_no_bias():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.c(self.a(x)) * self.c(self.b(x))

    net = made(Net, 0)
    # the biases are kept, each its own constant
    masks = {name: every_other(net, "a")["a.weight"] for name in ("a.weight", "b.weight")}
    assert check(net, masks, torch.randn(5, 6).double()).c.weight.shape == (3, 16)
    with torch.no_grad():
        net.b.bias.copy_(net.a.bias)  # now they are the same constants
    assert check(net, masks, torch.randn(5, 6).double()).c.weight.shape == (3, 8)


def test_what_torch_has_pruned_is_removed():
    net = made(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), 0)
    prune.ln_structured(net[0], "weight", 0.5, n=2, dim=0)
    net(x := torch.randn(5, 6).double())
    small = bmr.shrink(net, {}, x)
    torch.testing.assert_close(small(x), net.eval()(x), rtol=0, atol=1e-12)
    assert small[0].weight.shape == (4, 6)
    assert not any(name.endswith("_mask") for name, _ in small.named_buffers())


class Recursion(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        for _ in range(3):
            h = torch.tanh(self.b(h))
        return self.c(h)


def test_a_layer_that_reads_itself():
    net = made(Recursion, 0)
    check(net, every_other(net, "a"), torch.randn(5, 6).double(), 435)
    check(net, every_other(net, "a", "b"), torch.randn(5, 6).double(), 8 * 7 + 8 * 9 + 3 * 9)


class Flags(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(
        self,
        data: "torch.Tensor",
        embed: bool = False,
        *,
        gain: "torch.Tensor | None" = None,
        **more,
    ) -> "torch.Tensor":
        h = torch.tanh(self.a(data))
        if embed:
            return h
        return self.b(h if gain is None else h * gain)


def test_arguments_with_defaults():
    net = made(Flags, 0)
    x = torch.randn(5, 6).double()
    small = check(net, every_other(net, "a"), x, 8 * 7 + 27)
    assert torch.equal(small(data=x), small(x))


class Shuffle(nn.Module):
    """Half of the channels pass, half are convolved; then the halves are interleaved."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 8, 1)
        self.s = nn.PReLU(8)
        self.d = nn.Conv2d(4, 4, 1)
        self.o = nn.Linear(8, 3)

    def forward(self, x):
        a, b = self.s(self.c(x)).chunk(2, 1)
        y = torch.cat([a, torch.relu(self.d(b))], 1)
        n, c, height, width = y.shape
        y = (
            y.view(n, 2, c // 2, height, width)
            .transpose(1, 2)
            .contiguous()
            .view(n, c, height, width)
        )
        return self.o(y.mean((2, 3)))


def test_a_channel_shuffle():
    net = made(Shuffle, 0)
    check(net, every_other(net, "c", "d"), torch.randn(4, 3, 5, 4).double())


@pytest.mark.parametrize(
    "merged",
    [
        lambda h: h.view(h.shape[0], -1) / h.shape[1],
        lambda h: h.view(-1, 8 * 36),
        lambda h: h.reshape(h.size(0), 8 * 36),
    ],
)
def test_channels_and_places_merged_by_a_view(merged):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Conv2d(2, 8, 3), nn.Linear(8 * 36, 3)

        def forward(self, x):
            return self.c(merged(torch.relu(self.a(x))))

    net = made(Net, 0)
    check(net, every_other(net, "a"), torch.randn(3, 2, 8, 8).double(), 4 * 19 + 3 * (4 * 36 + 1))


def test_slopes_per_channel():
    net = made(
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3),
            nn.PReLU(8),
            nn.Conv2d(8, 4, 3),
            nn.PReLU(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        0,
    )
    small = check(net, every_other(net, "0"), torch.randn(4, 2, 6, 6).double())
    assert small[1].weight.tolist() == net[1].weight[::2].tolist()
    assert small[1].num_parameters == 4
    assert small[3].weight.shape == (1,)


def test_outputs_of_any_structure():
    net = made(
        lambda: Three(lambda net, h, x: {"mean": net.c(h), "rest": [h.sum(1), (x, net.c(-h))]}), 0
    )
    small = check(net, every_other(net, "a"), torch.randn(5, 6).double())
    assert sorted(small(torch.zeros(1, 6).double())) == ["mean", "rest"]


class Experts(nn.Module):
    """Four experts, of which each row takes two."""

    def __init__(self):
        super().__init__()
        self.gate, self.a = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 6, 10))
        self.b = nn.Parameter(torch.randn(4, 10, 3))

    def forward(self, x):
        best, which = self.gate(x).topk(2, -1)
        share = torch.zeros_like(self.gate(x)).scatter(-1, which, best.softmax(-1))
        h = torch.relu(torch.einsum("bi,eio->beo", x, self.a))
        return x[:, :3] + torch.einsum("beo,eop,be->bp", h, self.b, share)


@pytest.mark.slow
def test_a_product_of_three_tensors_leaves_the_number_of_rows_open(tmp_path):
    net = made(Experts, 0)
    masks = {"a": torch.zeros(4, 6, 10, dtype=torch.bool)}  # the product is constant
    before = torch.backends.opt_einsum.enabled
    small = check(net, masks, torch.randn(5, 6).double())
    assert torch.backends.opt_einsum.enabled == before
    assert small(torch.randn(7, 6).double()).shape == (7, 3)
    bmr.deploy(net, tmp_path, torch.randn(5, 6).double(), formats=["program"], seconds=0)
    x = torch.randn(7, 6).double()
    torch.testing.assert_close(loaded_module(tmp_path / "network.py").load_program()(x), net(x))


class NamedAsInGraphs(nn.Module):
    """A buffer, a parameter and layers with names that the module of a graph uses itself, and one
    with what such a name becomes.
    """

    def __init__(self):
        super().__init__()
        self.code, self.meta = nn.Linear(4, 6), nn.Linear(6, 3)
        self.recompile = nn.Linear(4, 3)
        self.register_buffer("graph", torch.rand(3, 3))
        self.register_buffer("graph_", torch.rand(3, 3))
        self._graph = nn.Parameter(torch.rand(3))

    def forward(self, x):
        y = self.meta(self.code(x).relu()) + self.recompile(x)
        return y @ self.graph @ self.graph_ * self._graph


@pytest.mark.filterwarnings("ignore:deploy.*cannot be written as Python")
@pytest.mark.parametrize(
    ("constant", "formats"),
    [
        (True, ["program"]),
        # onnx is an extra, whose import takes seconds
        *(pytest.param(c, ["program", "onnx"], marks=pytest.mark.slow) for c in (False, True)),
    ],
)
def test_parts_may_have_names_that_graphs_use(constant, formats, tmp_path):
    """With a layer that is a constant the result is a graph."""
    if "onnx" in formats:
        pytest.importorskip("onnxruntime")
    torch.manual_seed(2)
    net, x = NamedAsInGraphs(), torch.randn(5, 4)
    rows = torch.zeros(6, 4, dtype=torch.bool)
    rows[: 0 if constant else 3] = True
    plan = bmr.shrinking.shrink_plan(net, {"code.weight": rows}, x)
    small = plan.apply()
    assert plan.own_class is not constant
    want = net.meta((x @ (net.code.weight * rows).T + net.code.bias).relu()) + net.recompile(x)
    want = (want @ net.graph @ net.graph_ * net._graph).detach()
    torch.testing.assert_close(small(x).detach(), want, rtol=0, atol=1e-6)
    bmr.deploy(small, tmp_path, x, formats=formats, seconds=0, batches=(1,))
    loaded = loaded_module(tmp_path / "network.py")
    for format in formats:
        found = getattr(loaded, f"load_{format}")()(x)
        torch.testing.assert_close(
            found if isinstance(found, torch.Tensor) else found[0], want, rtol=0, atol=1e-6
        )
