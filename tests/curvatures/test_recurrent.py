"""Recurrent layers written out: the numbers of torch's own, and factors by autograd."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.overrides import TorchFunctionMode

import pyro_bmr as bmr
from pyro_bmr.curvatures.recurrent import RECURRENT, unrolled
from tests.curvatures.networks import dense_block, kron, softmax_hessian

LAYERS = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 3, "bidirectional": True, "batch_first": True}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    (nn.LSTM, {"bias": False, "proj_size": 2}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True, "dropout": 0.4}),
    (nn.GRU, {"bias": False, "batch_first": True}),
    (nn.RNN, {"bidirectional": True}),
    (nn.RNN, {"nonlinearity": "relu", "num_layers": 2, "bias": False}),
]


class Written(TorchFunctionMode):
    """Calls of recurrent functions are written out."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in RECURRENT and not kwargs:
            self.calls += 1
            return unrolled(func, args, {}, F.linear)
        return func(*args, **(kwargs or {}))


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(output):
    if isinstance(output, torch.Tensor):
        return [output]
    parts = [output.data] if isinstance(output, PackedSequence) else output
    return [leaf for part in parts for leaf in leaves(part)]


def both(net, *args):
    """What the network gives, and what it gives written out."""
    written = Written()
    with torch.no_grad():
        native = net(*args)
        with written:
            found = net(*args)
    assert written.calls == 1
    return leaves(native), leaves(found)


@pytest.mark.parametrize("kind, options", LAYERS)
@pytest.mark.parametrize("form", ["sequences", "one", "packed", "with states"])
def test_layers_are_those_of_torch(kind, options, form):
    torch.manual_seed(1)
    net = kind(4, 5, **options).double().eval()
    x = double(3, 6, 4) if net.batch_first else double(6, 3, 4)
    args = (x,)
    if form == "one":
        args = (double(6, 4),)
    elif form == "packed":
        lengths = torch.tensor([2, 6, 3])
        args = (pack_padded_sequence(x, lengths, net.batch_first, enforce_sorted=False),)
    elif form == "with states":
        count = net.num_layers * (1 + net.bidirectional)
        states = [double(count, 3, net.proj_size or 5, seed=2), double(count, 3, 5, seed=3)]
        args = (x, tuple(states) if kind is nn.LSTM else states[0])
    for native, found in zip(*both(net, *args), strict=True):
        torch.testing.assert_close(found, native, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_are_those_of_torch(kind, bias):
    torch.manual_seed(1)
    net, states = kind(4, 5, bias=bias).double(), (double(3, 5), double(3, 5, seed=1))
    given = states if kind is nn.LSTMCell else states[0]
    for native, found in zip(*both(net, double(3, 4, seed=2), given), strict=True):
        torch.testing.assert_close(found, native, rtol=1e-10, atol=1e-12)


def test_units_that_are_dropped_at_random_are_left_to_torch():
    net = nn.GRU(4, 5, num_layers=2, dropout=0.5).train()
    found = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in RECURRENT:
                found.append(unrolled(func, args, {}, F.linear))
            return func(*args, **(kwargs or {}))

    with Seen():
        net(torch.randn(6, 3, 4))
    assert found == [None]


class Read(nn.Module):
    """The logits of the last state."""

    def __init__(self, kind, **options):
        super().__init__()
        self.cells, self.head = kind(3, 4, batch_first=True, **options), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_factors_of_one_step_are_exact(kind):
    torch.manual_seed(2)
    net, x = Read(kind).double(), double(1, 1, 3)
    found = bmr.curvature(net, x, bmr.Categorical(), fisher="gauss-newton", progress=False)
    hessian = softmax_hessian(net(x).detach())
    for name in ("cells.weight_ih_l0", "cells.bias_ih_l0", "cells.bias_hh_l0", "head.weight"):
        torch.testing.assert_close(kron(found[name]), dense_block(net, x, name, hessian))
    assert not found.diagonals


def test_the_factors_of_sequences_are_sums_over_places():
    """Against an LSTM of one's own, whose gates before the nonlinearity are kept."""
    torch.manual_seed(2)
    net, x = Read(nn.LSTM).double(), double(7, 5, 3)
    y = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    found = bmr.curvature(net, (x, y), bmr.Categorical(), fisher="empirical", progress=False)
    cells = net.cells
    h = c = torch.zeros(7, 4).double()
    gates, before = [], []
    for t in range(5):
        before.append(torch.cat([h, torch.ones(7, 1).double()], 1))
        gate = x[:, t] @ cells.weight_ih_l0.T + cells.bias_ih_l0 + cells.bias_hh_l0
        gate = gate + h @ cells.weight_hh_l0.T
        gate.retain_grad()
        gates.append(gate)
        i, f, g, o = gate.split(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    F.cross_entropy(net.head(h), y, reduction="sum").backward()
    slopes = torch.cat([gate.grad for gate in gates])
    across, inner = found.layers["cells.weight_hh_l0"], found.layers["cells.weight_ih_l0"]
    for layer in (across, inner):
        torch.testing.assert_close(layer.outputs, slopes.T @ slopes)
    states = torch.cat(before).detach()
    torch.testing.assert_close(across.inputs, states.T @ states / 35)
    inputs = torch.cat([torch.cat([x[:, t], torch.ones(7, 1)], 1) for t in range(5)])
    torch.testing.assert_close(inner.inputs, inputs.T @ inputs / 35)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_network_is_pruned_and_stays_near_the_dense_one(kind):
    torch.manual_seed(0)
    net, x = Read(kind, num_layers=2, bidirectional=False), torch.randn(300, 6, 3)
    y = (x[:, :, 0].sum(1) > 0).long()
    adam = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(100):
        adam.zero_grad()
        F.cross_entropy(net(x), y).backward()
        adam.step()
    pruned = bmr.prune(
        net, x, bmr.Categorical(), 0.3, path=[0.6], corrections=20, last_corrections=60,
        progress=False,
    )  # fmt: skip
    assert len(pruned.masks) == 5 and pruned.kept == pytest.approx(0.3, abs=0.01)
    for name, mask in pruned.masks.items():
        found, dense = pruned.net.get_parameter(name), net.get_parameter(name)
        assert not found[~mask].any() and not (found[mask] == dense[mask]).any()
    agree = (pruned.net(x).argmax(1) == net(x).argmax(1)).double().mean()
    assert agree > 0.95


class Called(nn.Module):
    """A cell by its function, with keywords, in a loop."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h, c = x.new_zeros(len(x), 4), self.cell
        for t in range(x.shape[1]):
            h = torch.gru_cell(
                x[:, t], h, w_ih=c.weight_ih, w_hh=c.weight_hh, b_ih=c.bias_ih, b_hh=c.bias_hh
            )
        return self.head(h)


def test_a_cell_that_is_called_with_keywords():
    net, x = Called(), torch.randn(9, 4, 3)
    found = bmr.curvature(net, x, bmr.Categorical(), progress=False)
    assert set(found.layers) == {"cell.weight_ih", "cell.weight_hh", "head.weight"}


class Mapped(nn.Module):
    """A cell for each row by vmap, where no gradients can be heard."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.vmap(lambda row: self.cell(row[None], row.new_zeros(1, 4))[0])(x)
        return self.head(h)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_cell_without_gradients_of_its_own_has_no_factors():
    net, x = Mapped(), torch.randn(9, 3)
    found = bmr.curvature(net, x, bmr.Categorical(), progress=False)
    assert list(found.layers) == ["head.weight"]
    assert "without gradients" in found.why["cell.weight_ih"]


def test_recurrent_layers_run_without_cudnn_in_a_pass():
    """It refuses their backward pass in evaluation mode."""
    net, x, seen = Read(nn.LSTM), torch.randn(9, 4, 3), []
    net.head.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    before = torch.backends.cudnn.enabled
    options = {"path": [], "corrections": 1, "last_corrections": 1, "progress": False}
    bmr.prune(net, x, bmr.Categorical(), 0.5, **options)
    assert seen and not any(seen) and torch.backends.cudnn.enabled == before
    bmr.curvature(nn.Linear(3, 2), x[:, 0], bmr.Categorical(), progress=False)
