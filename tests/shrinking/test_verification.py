"""Whether two networks are the same function: which outputs are compared, what is refused."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyro_bmr as bmr
from pyro_bmr.shrinking import masked
from pyro_bmr.shrinking.plan import shrink_each
from pyro_bmr.shrinking.verification import (
    answers,
    check_same_function,
    difference,
    inputs_like,
)
from tests.shrinking.networks import Three, check, every_other, made


def noisy(net, h, x):
    return net.c(h + torch.randn(16, dtype=torch.float64))


def changed_in_place(net, h, x):
    y = net.b(h)
    h.mul_(2)
    return net.c(h) + net.c(y)


def written_into(net, h, x):
    y = net.b(h)
    y[:, 3] = h[:, 2] * y[:, 4]
    return net.c(y)


def other_at_other_rows(net, h, x):
    return net.c(h).softmax(0)


def scaled_by_the_rows(net, h, x):
    return net.c(h / x.shape[0]) + net.c(torch.ones_like(h)).sum(0)


# a forward of three layers 6 → 16 → 16 → 3, and the layers without weights
UNUSUAL = {
    "random numbers of a forward": (noisy, "a"),
    "an earlier value is changed": (changed_in_place, "a"),
    "a part of a value is changed": (written_into, "ab"),
    "rows that know of each other": (other_at_other_rows, "abc"),
    "the number of rows": (scaled_by_the_rows, "a"),
}


@pytest.mark.parametrize(("function", "layers"), UNUSUAL.values(), ids=UNUSUAL)
def test_forwards_that_are_not_of_layers_alone(function, layers):
    net = made(lambda: Three(function), 0)
    masks = {
        f"{k}.weight": torch.arange(len(net.get_parameter(f"{k}.weight")))
        .view(-1, 1)
        .expand(net.get_parameter(f"{k}.weight").shape)
        % 2
        > (1 if layers == "abc" else 0)
        for k in layers
    }
    small = bmr.shrink(net, masks, torch.randn(5, 6).double())
    rows = torch.randn(4, 6).double()
    for x in (rows, rows[:3]):
        torch.manual_seed(5)
        want = masked(net, masks)(x)
        torch.manual_seed(5)
        torch.testing.assert_close(small(x), want, rtol=0, atol=1e-12)


def rows_by_len(net, h, x):
    return net.c(h.view(len(x), -1))


def test_a_number_of_rows_that_is_fixed_while_the_forward_is_read():
    net = made(lambda: Three(rows_by_len), 0)
    assert type(check(net, every_other(net, "a", "b"), torch.randn(5, 6).double())) is Three
    net = made(lambda: Three(lambda net, h, x: net.c(h.view(len(x), 16) / h.shape[1])), 0)
    with pytest.raises(bmr.errors.ShrinkError, match=r"the number of rows.*`x.shape\[0\]`"):
        bmr.shrink(net, every_other(net, "a"), torch.randn(5, 6).double())


CALLS = itertools.count(1)


class Counting(nn.Module):
    """A forward that is another function at each call."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        return self.a(x) * next(CALLS)


def test_another_function_is_refused_with_a_figure():
    message = (
        r"not the same function as the masked one: on .* its outputs differ by \d"
        r".*masked network"
    )
    for read in (bmr.shrink, bmr.shrinking.shrink_plan):
        with pytest.raises(bmr.errors.ShrinkError, match=message):
            read(Counting(), {}, torch.randn(5, 6))
    with pytest.raises(bmr.errors.ShrinkError, match=message):
        shrink_each([Counting()], torch.randn(5, 6))


def test_hooks_are_part_of_the_function():
    net = made(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), 0)
    seen = []
    hook = net[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    check(net, every_other(net, "0"), torch.randn(5, 6).double(), 4 * 7 + 15)
    hook.remove()
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    check(net, every_other(net, "0"), torch.randn(5, 6).double(), 4 * 7 + 15)


def test_modes_frozen_weights_and_random_numbers_are_left_as_they_were():
    net = made(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)), 0
    ).train()
    net[0].requires_grad_(False)
    net[2].eval()
    state, random = {k: t.clone() for k, t in net.state_dict().items()}, torch.get_rng_state()
    x = torch.randn(4, 6).double()
    torch.set_rng_state(random)
    small = bmr.shrink(net, every_other(net, "0"), kept := x.clone())
    assert torch.equal(random, torch.get_rng_state()) and torch.equal(x, kept)
    assert [layer.training for layer in net] == [True, True, False, True]
    assert not any(m.training for m in small.modules())
    assert all(torch.equal(t, state[k]) for k, t in net.state_dict().items())
    assert [p.requires_grad for p in small.parameters()] == [False, False, True, True, True, True]


def test_rows_like_the_example_have_its_scale_and_three_times_and_a_third_of_it():
    """With a mean of 5 and a standard deviation of 0.2, over 4,000 entries a row."""
    x = 5 + 0.2 * torch.randn(3, 4_000, dtype=torch.float64)
    rows, one, scaled = inputs_like(x, nn.Identity())
    assert torch.equal(rows, x)
    for row, times in ((one[0], 1), (one[1], 1), (scaled[0], 3), (scaled[1], 1 / 3)):
        assert float(row.mean()) == pytest.approx(5, abs=0.05)
        assert float(row.std()) == pytest.approx(0.2 * times, rel=0.05)
    assert one.unique().numel() + scaled.unique().numel() > 15_900


@pytest.mark.parametrize("single", [True, False])
def test_tokens(single):
    net = made(
        lambda: nn.Sequential(
            nn.Embedding(9, 6), nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, 2)
        ),
        0,
    )
    x = torch.zeros(1, 3, dtype=torch.long) if single else torch.randint(9, (5, 3))
    drawn = inputs_like(x, net)
    assert all(t.dtype == torch.long and 0 <= int(t.min()) <= int(t.max()) < 9 for t in drawn)
    assert len(torch.cat(drawn).unique()) > 3
    assert sum(answer is not None for answer in answers(net, drawn).outputs) == len(drawn)
    small = bmr.shrink(net, every_other(net, "2"), x)
    tokens = torch.randint(9, (20, 3))
    torch.testing.assert_close(
        small(tokens), masked(net, every_other(net, "2"))(tokens), rtol=0, atol=1e-12
    )


def test_the_largest_difference():
    a, nan = torch.tensor([1.0, -4.0]), torch.tensor([math.nan, 2.0])
    assert difference([a, a], [a, a + torch.tensor([0.0, 0.5])]) == (0.5, 4.0)
    assert difference([nan], [nan]) == (0.0, 2.0) and difference([nan], [a])[0] == math.inf
    assert difference([a], [a[:1]])[0] == math.inf and difference([a], [a, a])[0] == math.inf
    assert difference([torch.tensor([math.inf])], [torch.tensor([-math.inf])])[0] == math.inf


class Single(nn.Module):
    def forward(self, x):
        return F.linear(x, torch.eye(3))


class Rounding(nn.Module):
    def forward(self, x):
        return x.half().softmax(1).to(x.dtype)


def test_float32_is_compared_in_float64():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(4, 6)
    want = answers(net, [x])
    assert want.double
    assert want.outputs[0][0].dtype == torch.float64
    assert net[0].weight.dtype == torch.float32
    assert not answers(nn.Sequential(net, Single()), [x]).double
    assert [answers(m, [x]).eps for m in (net, nn.Sequential(net, Rounding()))] == [
        torch.finfo(dtype).eps for dtype in (torch.float64, torch.float16)
    ]
    with torch.no_grad():
        net[2].bias += 1e-4 * float(want.outputs[0][0].abs().max())
    with pytest.raises(bmr.errors.ShrinkError, match="on the example"):
        check_same_function(want, net, [x])
