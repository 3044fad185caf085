"""FLOPs and parameters against counts by hand."""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.exporting import costs
from pyro_bmr.exporting.costs import flops
from pyro_bmr.shrinking import latency
from tests.exporting.networks import Queries


@pytest.fixture(scope="module")
def x():
    return bmr.load("digits").x_train[:40]


def test_flops_are_counted_by_hand(x):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 4))
    assert costs.flops(net, x) == 2 * (3 * 9 * 36 + 108 * 4)
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[0] = 0
    assert costs.parameters(layer) == {"parameters": 15, "nonzero": 11}


@pytest.mark.slow
def test_flops_of_attention():
    assert flops(Queries().eval(), torch.randn(2, 4)) == 2 * (
        4 * 8 + 3 * 8 * 8 + 2 * 4 * 8 * 8 + 2 * 3 * 4 * 8 + 3 * 8 * 8 + 8 * 3
    )
    # in one step where torch is left to choose
    layer, x = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval(), torch.randn(2, 5, 8)
    by_hand = 2 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 12)
    assert flops(layer, x) == flops(bmr.shrink(layer, {}, x), x) == by_hand
    assert torch.backends.mha.get_fastpath_enabled()


def test_networks_are_timed_in_turns(monkeypatch):
    # of each network in each turn: a machine that gets slower meets both alike
    times = {"a": iter([[1.0, 9.0], [2.0, 8.0], [30.0, 70.0]]), "b": iter([[5.0], [6.0], [90.0]])}
    asked = []

    def milliseconds(run, example, batch, seconds, least):
        asked.append((run, batch, seconds, least))
        return next(times[run])

    monkeypatch.setattr(costs, "milliseconds", milliseconds)
    contenders = [costs.Timed({"format": name}, name, None) for name in "ab"]
    contenders.append(costs.Timed({"format": "c"}, "c", None, like="b"))
    rows = costs.with_latencies(contenders, 0.6, (4,))
    assert asked == [(name, 4, pytest.approx(0.2), 1) for _ in range(3) for name in "ab"]
    assert [row["format"] for row in rows] == ["a", "b", "c"]
    assert [row["latency of"] for row in rows] == ["a", "b", "b"]
    assert [row["ms at batch 4"] for row in rows] == [8.5, 6.0, 6.0]
    # the places 0.9 × 5 and 0.9 × 2 in order: between 30 and 70, and between 6 and 90
    assert [row["p90 ms at batch 4"] for row in rows] == pytest.approx([50.0, 73.2, 73.2])
    assert [row["calls at batch 4"] for row in rows] == [6, 3, 3]
    assert contenders[0].costs == {"format": "a"}


@pytest.mark.parametrize(
    ("taken", "least", "counted"),
    [
        ([0.05, 0.04, 0.07, 9.0], 1, [40, 70]),  # the first is not counted; 0.04 + 0.07 > 0.1
        ([0.05, 0.04, 0.07, 0.01, 9.0], 3, [40, 70, 10]),
        ([0.25, 9.0], 1, [250]),  # longer than all the time there is: counted, and no other
        ([0.25, 0.3, 9.0], 2, [250, 300]),
    ],
)
def test_which_calls_are_counted(taken, least, counted, monkeypatch):
    clock, left = [0.0], iter(taken)

    def run(x):
        clock[0] += next(left)

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    times = latency.milliseconds(run, torch.zeros(1, 1), 1, 0.1, least)
    assert times == pytest.approx(counted)
