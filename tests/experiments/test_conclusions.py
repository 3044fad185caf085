"""The sentences under a table, word for word, and what is marked in it."""

import math

import pandas as pd
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.experiments.base_rates import base_rates
from pyro_bmr.experiments.compare import summary
from pyro_bmr.experiments.conclusions import conclusions
from pyro_bmr.experiments.lines import lines_of

USUAL = {
    "model": "m",
    "data": "d",
    "accuracy": 0.9,
    "nll": 0.3,
    "nll_error": 0.0,
    "ece": 0.02,
    "kept": 1.0,
    "kept_parameters": 50,
    "converged": math.nan,
    "base_accuracy": 0.25,
    "base_nll": 1.5,
}
REALS = {
    "rmse": 2.0,
    "accuracy": math.nan,
    "ece": math.nan,
    "base_rmse": 3.0,
    "base_accuracy": math.nan,
}


def table(*rows, **usual):
    """A table with a row for each dictionary, and `USUAL` where it says nothing."""
    filled = pd.DataFrame([{**USUAL, "seed": 0, **usual, **row} for row in rows])
    return filled.dropna(axis=1, how="all")


def row(name, seed=0, **figures):
    prior, route = name.split()
    return {"prior": prior, "route": route, "seed": seed, **figures}


def test_the_error_is_that_of_seeds_and_scored_rows():
    """√(s²/S + e²) by hand: s² = 0.0008, S = 2, e = 0.04."""
    two = [row("g map", 0, nll=0.30, nll_error=0.03), row("g map", 1, nll=0.34, nll_error=0.05)]
    (line,) = lines_of(table(*two))
    assert line.error() == pytest.approx(math.sqrt(0.0008 / 2 + 0.0016))
    assert conclusions(table(*two)) == [
        "In log score g map is first, with an NLL of 0.320 ± 0.045 nats per row (2 seeds; standard"
        " error of seeds and scored rows)."
    ]
    (line,) = lines_of(table(*two).drop(columns="nll_error"))
    assert line.error() == pytest.approx(0.02)
    # level with it while the difference is below √(0.0447² + 0.06²) = 0.0748
    for gap, word in ((0.0745, "h map is level with it"), (0.0752, "no other row is level")):
        other = row("h map", 0, nll=0.32 + gap, nll_error=0.06)
        assert word in conclusions(table(*two, other))[0]


def test_one_seed():
    rows = [row("g map", nll=0.5), row("g fitted", nll=0.4, nll_error=0.07)]
    assert conclusions(table(*rows, nll_error=0.08)) == [
        "In log score g fitted is first, with an NLL of 0.400 ± 0.070 nats per row (one seed;"
        " standard error of the scored rows alone); within the error of the difference, g map is"
        " level with it."
    ]
    assert conclusions(table(*rows).drop(columns="nll_error")) == [
        "In log score g fitted is first, with an NLL of 0.400 nats per row (one seed, no error);"
        " next is g map with 0.500."
    ]


def test_ties_and_many_rows_that_are_level():
    tied = [row("g map"), row("h map", nll=0.7), row("g fitted")]
    assert (
        "g map and g fitted are first, with an NLL of 0.300 ± 0.000" in conclusions(table(*tied))[0]
    )
    many = [row(f"p{k} map", nll=0.3 + 0.01 * k, kept=1 - 0.13 * k) for k in range(6)]
    assert conclusions(table(*many, nll_error=0.03))[0].endswith(
        "; within the error of the difference, 4 other rows (the sparsest is p4 map, with 48 %"
        " kept) are level with it."
    )


def test_the_reduction_beside_the_fitted_row_over_the_seeds_of_both():
    rows = [
        row("g fitted", 0, accuracy=0.91, nll=0.25, ece=0.03),
        row("g fitted", 1, accuracy=0.5, nll=1.2, ece=0.4),  # its reduced cell failed
        row("g reduced", 0, accuracy=0.89, nll=0.27, ece=0.025, kept=0.0532),
        row("h reduced", 0),  # nothing was fitted under it
    ]
    assert conclusions(table(*rows), ["g reduced (seed 1)"])[1:] == [
        "Beside the fitted row of its prior, g reduced keeps 5.32 % instead of 100 %, with −0.020"
        " in accuracy, +0.020 in NLL and −0.005 in ECE.",
        "Failed, and in no figure: g reduced (seed 1).",
    ]
    real = [row("g fitted", rmse=1.5), row("g reduced", nll=0.31, kept=0.5)]
    assert conclusions(table(*real, **REALS))[1] == (
        "Beside the fitted row of its prior, g reduced keeps 50 % instead of 100 %, with +0.500 in"
        " RMSE and +0.010 in NLL."
    )


@pytest.mark.parametrize(
    ("nll", "verdict"),
    [(0.39, "better"), (0.28, "worse"), (0.32, "level within error")],
)
def test_magnitude_pruning_beside_the_row_of_its_size(nll, verdict):
    rows = [
        row("h reduced", kept=0.3),
        row("g reduced", kept=0.1, nll=0.31),
        row("g reduced", 1, kept=0.2, nll=5.0),  # whose baseline failed
        row("none magnitude", kept=0.0995, nll=nll, accuracy=0.85),
    ]
    assert conclusions(table(*rows, nll_error=0.02, base_nll=9.0))[1] == (
        "At the same size, 10 % of the parameters, magnitude pruning has accuracy 0.850 and NLL"
        f" {nll:.3f}, g reduced accuracy 0.900 and NLL 0.310: in log score the reduction is"
        f" {verdict}."
    )
    rows[-1]["kept"] = 0.09
    assert not any("magnitude" in said for said in conclusions(table(*rows, base_nll=9.0))[1:])


def test_what_did_not_converge():
    rows = [
        row("g map", 0, converged=1.0),
        row("g map", 1, converged=0.0),
        row("h map", 0, converged=0.0),
        row("none plain", 0),
    ]
    assert conclusions(table(*rows))[-1] == (
        "Not converged: g map (1 of 2 seeds) and h map (1 of 1 seed); their figures may still"
        " change with a longer fit."
    )
    assert conclusions(table(rows[0], rows[3]))[-1] == "All fits converged."
    assert conclusions(table(rows[2], rows[3]))[-1] == (
        "No fit converged; the figures may still change with a longer fit."
    )
    texts = summary(table(*rows))
    assert texts["converged"].tolist() == ["50% of seeds", "no", ""]


def test_rows_at_chance_are_marked_and_named():
    rows = [
        row("g map"),
        row("g fitted", accuracy=0.25, nll=1.4),  # the majority class, with some doubt
        row("h map", accuracy=0.2, nll=math.nan),  # an infinite loss
        row("h fitted", nll=1.5 + 1e-9),
    ]
    assert conclusions(table(*rows))[-1] == (
        "Marked with *: g fitted, h map and h fitted, no better than a prediction that ignores the"
        " inputs (accuracy 0.250, NLL 1.500)."
    )
    texts = summary(table(*rows))
    assert texts["accuracy"].tolist() == ["0.900", "0.250 *", "0.200 *", "0.900"]
    assert texts["nll"].tolist() == ["0.300", "1.400", " *", "1.500 *"]
    real = table(row("g map", rmse=3.0), row("h map"), **REALS)
    assert summary(real)["rmse"].tolist() == ["3.000 *", "2.000"]
    assert conclusions(real)[-1] == (
        "Marked with *: g map, no better than a prediction that ignores the inputs (RMSE"
        " 3.000, NLL 1.500)."
    )


def test_the_base_rates_are_those_of_the_training_rows():
    x = torch.zeros(8, 1)
    y, y_test = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2]), torch.tensor([1, 0, 2, 0])
    found = base_rates(bmr.Data("d", x, y, x[:4], y_test, classes=3))
    expected = -(2 * math.log(5 / 8) + math.log(2 / 8) + math.log(1 / 8)) / 4
    assert found == {"base_accuracy": 0.5, "base_nll": pytest.approx(expected)}
    y, y_test = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([2.0, 9.0])
    real = bmr.Data("d", x[:4], y, x[:2], y_test, target_mean=10.0, target_scale=2.0)
    density = torch.distributions.Normal(4.0 * 2 + 10, math.sqrt(5) * 2)
    assert base_rates(real) == {
        "base_rmse": pytest.approx(2 * math.sqrt((2**2 + 5**2) / 2)),
        "base_nll": pytest.approx(-float(density.log_prob(y_test * 2 + 10).mean()), rel=1e-6),
    }
