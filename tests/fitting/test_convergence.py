"""Fits that find out themselves when they are done, and what every fit says of its convergence."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_bmr as bmr
from pyro_bmr.errors import FitError
from pyro_bmr.fitting.convergence import MOST_BLOCKS, Rise, rise_at_full_rate, stretch
from pyro_bmr.fitting.progress import Progress

SHORT = bmr.UntilConverged(steps=1_600, first=50)


def regression(rows, columns=4, seed=0, noise=0.4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weights = torch.linspace(-1.5, 2.0, columns, dtype=torch.float64)
    y = x @ weights + noise * torch.randn(rows, generator=generator, dtype=torch.float64)

    def program(x, y=None):
        w = pyro.sample("w", dist.Normal(x.new_zeros(columns), 3.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    precision = x.T @ x / noise**2 + torch.eye(columns, dtype=torch.float64) / 9
    mean = torch.linalg.solve(precision, x.T @ y / noise**2)
    return program, (x, y), mean, precision.diagonal().rsqrt()


fit = partial(bmr.fit, optimizer=bmr.adam(5e-2), progress=False)


def test_a_fit_ends_at_the_exact_posterior_by_itself():
    program, data, mean, sd = regression(60)
    found = fit(program, data, epochs=SHORT)
    site = found.posterior["w"]
    assert found.converged and "in the last cycle" in found.convergence
    # cycles of 50, 100, 200, ... steps
    assert found.history["step"].iloc[-1] in {150, 350, 750, 1550}
    # KL to the best Gaussian of independent entries, nats: no more than counts as none
    ratio = site.var / sd**2
    kl = 0.5 * (ratio - 1 - ratio.log() + (site.mean - mean).square() / sd**2).sum()
    assert kl < SHORT.tolerance * 60
    # each cycle ends at a rate of nearly 0 and the next begins at the full one
    rates = found.history["learning_rate"]
    assert rates[48] < 1e-3 and rates[50] > 0.049


def test_a_budget_of_steps_is_kept_and_the_fit_warns():
    program, data, *_ = regression(60)
    with pytest.warns(bmr.PyroBMRWarning, match=r"has not converged.*UntilConverged\(steps=500\)"):
        found = fit(
            program, data, epochs=bmr.UntilConverged(250, first=60), optimizer=bmr.adam(1e-3)
        )
    assert not found.converged
    assert found.history["step"].iloc[-1] == 180  # 60 + 120; 70 are left, fewer than 120


def test_a_budget_may_end_within_an_epoch():
    program, data, *_ = regression(60)
    found = fit(program, data, epochs=bmr.UntilConverged(7, first=7), batch_size=20)
    assert found.history[["epoch", "step"]].values.tolist() == [[1, 3], [2, 6], [3, 7]]
    assert not found.converged and found.convergence == "the fit is too short to tell"


def test_a_budget_of_seconds():
    program, data, *_ = regression(60)
    until = bmr.UntilConverged(10_000, seconds=1e-3, first=50, tolerance=0)
    assert fit(program, data, epochs=until).history["step"].iloc[-1] == 50


@pytest.mark.slow
def test_reductions_take_their_places_in_the_first_cycle():
    program, data, *_ = regression(60, columns=6)
    every = bmr.Every(kept=1 / 3, start=0.2, stop=0.6)
    found = fit(program, data, epochs=bmr.UntilConverged(1_000, first=300), reduce=every)
    kept = found.history["kept"]
    # every tenth from 0.2 on; none in the warm-up of 0.3
    assert list(kept[[88, 89, 90]]) == [1.0, pytest.approx(2 / 3), pytest.approx(2 / 3)]
    assert kept[179] == pytest.approx(1 / 3) == kept.iloc[-1]


@pytest.mark.slow  # test_checkpoints.py stops shorter fits
def test_it_continues_to_the_bit(tmp_path):
    program, data, *_ = regression(60)
    call = partial(fit, program, data, epochs=SHORT)
    whole = call()

    class Stop(Exception):
        pass

    steps = 0

    def stops(x, y=None):
        nonlocal steps
        steps += y is not None
        if steps == 220:  # in the third cycle
            raise Stop
        return program(x, y)

    stops.__module__, stops.__qualname__ = program.__module__, program.__qualname__
    with pytest.raises(Stop):
        fit(stops, data, epochs=SHORT, checkpoint=bmr.Checkpoints(tmp_path, every_steps=70))
    steps = 10_000
    again = fit(stops, data, epochs=SHORT, checkpoint=bmr.Checkpoints(tmp_path, every_steps=70))
    assert torch.equal(again.posterior["w"].mean, whole.posterior["w"].mean)
    assert torch.equal(again.posterior["w"].var, whole.posterior["w"].var)
    columns = ["step", "elbo", "learning_rate"]
    assert again.history[columns].equals(whole.history[columns])
    assert again.convergence == whole.convergence


def test_a_stretch_has_the_error_of_its_mean():
    # differences 2, −1, 4: s² = (4 + 1 + 16)/(2·3) = 3.5, over four blocks
    assert stretch([1.0, 3.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(3.5 / 4)))
    # a trend is no noise: 100 blocks that rise by 1 have s² = ½, whereas they spread by 29
    assert stretch([float(k) for k in range(100)])[1] == pytest.approx(math.sqrt(0.5 / 100))


def test_the_rise_of_one_cycle_is_that_before_its_middle():
    blocks = [float(min(k, 40)) + (k % 2) * 0.1 for k in range(128)]
    rise = rise_at_full_rate(blocks, allowed=0.5)
    assert rise is not None  # blocks 32 … 47 and 48 … 63: up to 40, and at it
    assert rise.nats == pytest.approx(40 - (sum(range(32, 41)) + 7 * 40) / 16)
    assert not rise.is_over and not Rise(0.6, 0.09, 0.5).is_over and Rise(0.6, 0.11, 0.5).is_over
    assert not Rise(0.6, 0.51, 0.5).is_over  # noise hides it
    assert rise_at_full_rate(blocks[:31], 0.5) is None


def test_blocks_are_joined_as_they_get_many():
    progress = Progress(length=5 * MOST_BLOCKS)
    for k in range(2 * MOST_BLOCKS):
        progress.add(3.0 * k, 1.0, temperature=0.5)
    assert progress.block == 4 and len(progress.blocks) == MOST_BLOCKS // 2
    # the bound 3k/T − 1 over steps 4 … 7
    assert progress.blocks[1] == pytest.approx(6 * 5.5 - 1)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"steps": 0}, "steps=0.*whole number of steps >= 1"),
        ({"first": 2.5}, "first=2.5"),
        ({"seconds": 0}, "seconds=0.*finite number > 0, or None"),
        ({"tolerance": math.nan}, "tolerance=nan"),
    ],
)
def test_a_budget_out_of_range(wrong, message):
    with pytest.raises(FitError, match=message):
        bmr.UntilConverged(**wrong)


@pytest.mark.parametrize(
    "prior, guide, rate, steps",
    [
        (bmr.Horseshoe(), bmr.MeanField, 3e-3, 80),
        (bmr.Gaussian("layer"), bmr.MeanField, 3e-3, 240),
        pytest.param(
            *(bmr.Gaussian("layer"), partial(bmr.LowRankPlusDiagonal, rank=3), 1e-2, 240),
            marks=pytest.mark.slow,  # the rule sees the history alone
        ),
    ],
    ids=["horseshoe", "layer", "low-rank"],
)
def test_a_short_fit_at_a_small_rate_is_not_taken_for_a_flat_one(prior, guide, rate, steps):
    """Each ends 100 nats or more below what is reached; their rise is within three errors of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 20, generator=generator)
    noise = torch.randn(200, generator=generator)
    y = x[:, :3] @ torch.tensor([1.0, -1.0, 0.5]) + 0.5 * noise
    torch.manual_seed(0)
    model = bmr.BayesianNetwork(torch.nn.Linear(20, 1), prior, bmr.Normal())
    found = bmr.fit(
        model, (x, y), guide=guide, epochs=steps // 2, optimizer=bmr.adam(rate), progress=False
    )
    assert found.history["step"].iloc[-1] == steps and not found.converged


KINDS = {
    "mean-field": (bmr.MeanField, None, bmr.natural_gradient(), 800),
    "low-rank": (partial(bmr.LowRankPlusDiagonal, rank=2), bmr.adam(1e-2), bmr.adam(6e-2), 1_500),
    "full-rank": (bmr.FullRank, bmr.adam(1e-2), bmr.adam(6e-2), 1_500),
    "auto-normal": (AutoNormal, bmr.adam(1e-2), bmr.adam(6e-2), 800),
}
"""Name → guide, the optimiser of the short fits, that of the long ones, and their steps."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit has not converged")
def test_short_fits_are_told_from_long_ones():
    """Twenty fits of each kind, on all rows in a step."""
    short, long = 0, 0
    for seed in range(5):
        program, data, mean, sd = regression(150, columns=5, seed=seed)
        data = data[0].float(), data[1].float()
        for guide, slow, quick, steps in KINDS.values():
            call = partial(
                bmr.fit, program, data, guide=guide, seed=seed, batch_size=150, progress=False
            )
            few = call(epochs=100 + 20 * seed, optimizer=slow)
            many = call(epochs=steps, optimizer=quick)
            rise = many.history["elbo"][-20:].mean() - few.history["elbo"][-20:].mean()
            assert rise > 10 * bmr.UntilConverged.tolerance * 150
            assert ((many.posterior["w"].mean - mean).abs() < 0.5 * sd).all()
            short += not few.converged
            long += many.converged
    assert short >= 19 and long >= 19, (short, long)
