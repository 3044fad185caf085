"""What would not fit into memory is refused before any work, with both figures and another way;
what is freed goes back; sums without copies.
"""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr import memory
from pyro_bmr.formulas.gaussian import total

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
Y = X[:, 0]


def network(width=30):
    torch.manual_seed(0)
    return bmr.BayesianNetwork(
        nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 1), nn.Flatten(0)),
        bmr.Gaussian(scale=1.0),
        bmr.Normal(),
    )


def test_what_is_free_is_the_least_of_what_the_system_says(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_SYSTEM", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    cpu = torch.device("cpu")
    assert memory.free_bytes(cpu) == float("inf")
    (tmp_path / "meminfo").write_text("MemTotal:       99 kB\nMemAvailable:   7 kB\n")
    assert memory.free_bytes(cpu) == 7 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(cpu) == 7 * 1024
    (tmp_path / "memory.max").write_text("4000\n")
    assert memory.free_bytes(cpu) == 3000
    memory.check_memory("this", 3000, cpu, "do that")
    with pytest.raises(
        bmr.errors.ModelError,
        match=r"^this takes 3e-06 GB, and 3e-06 GB are free on 'cpu'; do that$",
    ):
        memory.check_memory("this", 3001, cpu, "do that")


def test_the_machine_says_what_is_free():
    assert memory.free_bytes(torch.device("cpu")) > 1e6


@pytest.mark.parametrize(
    ("needed", "asked", "words"),
    [
        (
            4 * 150**2 * 4,
            lambda: bmr.FullRank(network(), X, Y),
            "site '0.weight': a full covariance of its 150 entries",
        ),
        (
            4 * 5 * 150 * 4,
            lambda: bmr.LowRankPlusDiagonal(network(), X, Y, rank=3),
            "site '0.weight': rank 3 plus diagonal of its 150 entries",
        ),
        (
            8 * 212 * 4,
            lambda: bmr.fit(network(), (X, Y), epochs=1, progress=False),
            "a fit of 212 weights",
        ),
        (
            2 * 50 * 40 * 2 * 4,
            lambda: bmr.predict(*FITTED, X, draws=50),
            "a prediction of 50 draws at 40 rows",
        ),
        (
            2 * 9 * 211 * 4,
            lambda: bmr.exporting.ensemble(*FITTED, draws=9),
            "an ensemble of 9 networks",
        ),
    ],
)
def test_it_is_refused_at_the_byte(monkeypatch, needed, asked, words):
    monkeypatch.setattr(memory, "free_bytes", lambda device: float(needed))
    asked()
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1.0)
    with pytest.raises(
        bmr.errors.ModelError, match=f"^{words}.* takes .* GB, and .* GB are free on 'cpu'; "
    ):
        asked()


FIT = bmr.fit(network(), (X, Y), epochs=1, progress=False)
FITTED = FIT.program, FIT.posterior


def test_a_sum_over_flags_needs_no_copy_and_is_the_sum_of_what_they_have():
    values = torch.linspace(-1, 2, 200_001, dtype=torch.float32)
    flags = torch.arange(200_001) % 3 == 1
    values[~flags] = torch.nan
    assert total(values, flags) == pytest.approx(values[flags].double().sum().item(), rel=1e-12)
    assert total(values[flags]) == pytest.approx(values[flags].double().sum().item(), rel=1e-12)


def test_freed_memory_goes_back():
    """To a system whose C library can; nothing else changes."""
    held = torch.ones(1 << 20)
    memory.return_freed()
    assert bool((held == 1).all())
