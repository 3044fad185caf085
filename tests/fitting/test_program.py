"""What a fit finds out about its program before the first step: the order of rows, latent sites
with entries per row, guides of other sites.
"""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

import pyro_bmr as bmr
from tests.parameters import others_slow

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 3, generator=GENERATOR)
Y = X @ torch.tensor([1.0, 0.0, -1.0]) + 3.0 + 0.5 * torch.randn(40, generator=GENERATOR)
fit = partial(bmr.fit, epochs=1, batch_size=40, progress=False)
GUIDES = [bmr.MeanField, bmr.Point, bmr.FullRank, AutoNormal, AutoDiagonalNormal]


def series(rho=0.9, n=200):
    generator = torch.Generator().manual_seed(0)
    y = torch.zeros(n)
    for t in range(1, n):
        y[t] = rho * y[t - 1] + 0.1 * torch.randn((), generator=generator)
    return torch.arange(float(n)), y


def ar1(time, y=None):
    rho = pyro.sample("rho", dist.Normal(time.new_tensor(0.0), 1.0))
    before = torch.zeros_like(time) if y is None else torch.cat([y.new_zeros(1), y[:-1]])
    with pyro.plate("time", len(time)):
        pyro.sample("y", dist.Normal(rho * before, 0.1), obs=y)


@pytest.mark.slow
def test_a_series_keeps_its_order_if_a_batch_is_all_of_it():
    time, y = series()
    before, after = y[:-1].double(), y[1:].double()
    exact = float(before @ after / 0.01 / (before @ before / 0.01 + 1))  # the conjugate posterior
    # of 199, the last row joins
    for settings in (
        {"batch_size": 199},
        {"batch_size": 200, "guide": bmr.Point},
        {"batch_size": 100, "shuffle": False},
    ):
        result = bmr.fit(
            ar1, (time, y), epochs=100, optimizer=bmr.adam(0.1), progress=False, **settings
        )
        assert (
            float(result.posterior["rho"].mean) == pytest.approx(exact, abs=0.03)
            and abs(exact - 0.9) < 0.05
        )


@pytest.mark.parametrize("settings", [{"batch_size": 50}, {"batch_size": 200, "validation": 0.2}])
def test_a_series_is_not_mixed_without_a_word(settings):
    with pytest.raises(
        bmr.errors.FitError,
        match=r"observed site 'y' depends on the order of the rows.*shuffle=False",
    ):
        bmr.fit(ar1, series(), progress=False, **settings)


def test_rows_in_order_are_stretches_and_the_last_ones_are_held_out():
    seen = []

    def program(x, y=None):
        seen.append(x[:, 0].tolist())
        w = pyro.sample("w", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    rows = torch.arange(20.0)[:, None]
    result = bmr.fit(
        program,
        (rows, rows[:, 0]),
        shuffle=False,
        batch_size=5,
        epochs=1,
        validation=0.25,
        progress=False,
    )
    steps = [batch for batch in seen if len(batch) == 5]
    assert steps[-4:-1] == [list(map(float, range(k, k + 5))) for k in (0, 5, 10)] and steps[
        -1
    ] == [15.0, 16.0, 17.0, 18.0, 19.0]
    other = bmr.fit(
        program,
        (rows[:15], rows[:15, 0]),
        shuffle=False,
        batch_size=5,
        epochs=1,
        validation=(rows[15:], rows[15:, 0]),
        progress=False,
    )
    assert result.history.equals(other.history)


def test_the_order_is_a_setting_of_a_checkpoint(tmp_path):
    run = partial(fit, linear, (X, Y), batch_size=20, checkpoint=tmp_path)
    run()
    with pytest.raises(bmr.errors.FitError, match="shuffle was True, is False"):
        run(shuffle=False)


def linear(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(x.new_tensor(0.0), 5.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w + b, 0.5), obs=y)


def test_what_is_not_a_sum_over_rows_is_said():
    def penalised(x, y=None):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.factor("penalty", -w.abs().sum())
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    def centred(x, y=None):
        return linear(x - x.mean(0), y)

    def kernel(x, y=None):
        scale = pyro.sample("scale", dist.LogNormal(x.new_tensor(0.0), 1.0))
        cov = scale * (-torch.cdist(x, x)).exp() + 0.1 * torch.eye(len(x))
        return pyro.sample("y", dist.MultivariateNormal(x.new_zeros(len(x)), cov), obs=y)

    with pytest.raises(
        bmr.errors.FitError,
        match=r"observed site 'penalty' does not depend on the rows.*batch_size=len\(x\)",
    ):
        fit(penalised, (X, Y), batch_size=20)
    for program in (centred, kernel):
        with pytest.warns(
            bmr.PyroBMRWarning, match="'y': the log density of a batch is not the sum"
        ):
            fit(program, (X, Y), batch_size=20)
        fit(program, (X, Y))
    fit(penalised, (X, Y))
    for program in (linear, poutine.scale(linear, 0.5)):  # and nothing is said of these
        fit(program, (X, Y), batch_size=20)


def test_programs_that_draw_and_that_write_into_their_rows_are_taken():
    def noisy(x, y=None):
        return linear(x + 0.1 * torch.randn_like(x), y)

    def writes(x, y=None):
        return linear(x.mul_(2.0), y)

    fit(noisy, (X, Y), batch_size=20)
    x = X.clone()
    own = fit(writes, (x, Y), epochs=3)
    assert torch.equal(x, X)
    assert torch.equal(
        own.posterior["w"].mean,
        fit(lambda x, y=None: linear(2.0 * x, y), (X, Y), epochs=3).posterior["w"].mean,
    )
    torch.testing.assert_close(
        bmr.predict(writes, own.posterior, x).mean,
        bmr.predict(lambda x, y=None: linear(2.0 * x, y), own.posterior, X).mean,
    )
    assert torch.equal(x, X)


def without_b(program):
    return AutoNormal(poutine.block(program, hide=["b"]))


def other_program(x, y=None):
    pyro.sample("c", dist.Normal(x.new_tensor(0.0), 1.0))
    return linear(x, y)


def narrow(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(x.new_tensor(0.0), 5.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x[:, 0] * w + b, 0.5), obs=y)


class Observes(nn.Module):
    def __init__(self, *_):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))

    def forward(self, x, y=None):
        pyro.sample("w", dist.Normal(self.loc, 0.1).to_event(1))
        pyro.sample("b", dist.Normal(self.loc[0], 0.1), obs=torch.tensor(1.0))


class Wide(Observes):
    def forward(self, x, y=None):
        pyro.sample("w", dist.Normal(self.loc[:1], 0.1).to_event(1))
        pyro.sample("b", dist.Normal(self.loc[0], 0.1))


def by_hand(x, y=None):
    loc = pyro.param("loc", torch.zeros(3))
    pyro.sample("w", dist.Normal(loc, 0.1).to_event(1))
    pyro.sample("b", dist.Normal(loc[0], 0.1))


def module_of(program):
    return bmr.MeanField(program, X, Y)


OTHER_GUIDES = {
    "lacks a site": (
        without_b,
        bmr.errors.ModelError,
        "site 'b' of the program is not in the guide, whose sites are: w",
    ),
    "lacks a site, MeanField": (
        lambda _: bmr.MeanField(poutine.condition(linear, data={"b": torch.tensor(0.0)}), X, Y),
        bmr.errors.ModelError,
        "site 'b'.*not in",
    ),
    "has a site more": (
        lambda _: AutoNormal(other_program),
        bmr.errors.ModelError,
        "site 'c' of the guide is no latent site of the program",
    ),
    "has a site more, MeanField": (
        lambda _: module_of(other_program),
        bmr.errors.ModelError,
        "site 'c' of the guide is no latent site",
    ),
    "another shape": (
        Wide,
        bmr.errors.ModelError,
        r"site 'w'.*\(3,\), got \(1,\)|site 'w' has shape \(1,\).* and \(3,\)",
    ),
    "another shape, MeanField": (
        lambda _: module_of(narrow),
        bmr.errors.ModelError,
        r"site 'w'.*\(3,\), got \(1,\)|site 'w' has shape \(1,\).* and \(3,\)",
    ),
    "observes": (Observes, bmr.errors.ModelError, "site 'b' of the guide is observed"),
    "a function of the rows": (by_hand, bmr.errors.FitError, "Pyro's SVI"),
    "that it makes": (
        lambda _: by_hand,
        bmr.errors.FitError,
        "pyro.param 'loc' of the guide would not be trained.*Pyro's SVI",
    ),
}


@pytest.mark.parametrize("case", OTHER_GUIDES)
def test_guides_of_other_sites_are_refused_by_name(case):
    guide, error, words = OTHER_GUIDES[case]
    with pytest.raises(error, match=words):
        fit(linear, (X, Y), guide=guide)
    assert len(pyro.get_param_store()) == 0
    if error is bmr.errors.ModelError:
        with pytest.raises(error, match=words):
            bmr.fitting.elbo_terms(linear, guide(linear), X, Y)


def local(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(x.new_tensor(0.0), 0.5))
        return pyro.sample("y", dist.Normal(x @ w + u, 0.3), obs=y)


def subsampled(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("data", 40, subsample=torch.arange(len(x))):
        u = pyro.sample("u", dist.Normal(x.new_tensor(0.0), 0.5))
        return pyro.sample("y", dist.Normal(x @ w + u, 0.3), obs=y)


def groups(x, y=None):
    index = (x[:, 0] > x[0, 0]).long() if len(x) < 20 else torch.arange(len(x)) // 5
    u = pyro.sample("u", dist.Normal(x.new_zeros(int(index.max()) + 1), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(u[index], 0.3), obs=y)


def in_steps(x, y=None):
    u = x.new_tensor(0.0)
    for t in range(len(x)):
        u = pyro.sample(f"u{t}", dist.Normal(0.9 * u, 0.5))
        pyro.sample(f"y{t}", dist.Normal(u, 0.3), obs=None if y is None else y[t])


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("program", [local, subsampled, groups, in_steps])
def test_latent_sites_with_entries_per_row(program, guide):
    result = fit(program, (X, Y), guide=guide)
    assert sum(
        site.mean.numel() for name, site in result.posterior.sites.items() if name.startswith("u")
    ) == (8 if program is groups else 40)
    with pytest.raises(
        bmr.errors.FitError,
        match=r"site 'u\w*': its shape depends on the rows.*batch_size=len\(x\) \(40\)",
    ):
        fit(program, (X, Y), guide=guide, batch_size=20)


def test_a_posterior_per_row_is_the_exact_one():
    x, y = X.double(), Y.double() - 3
    cov = torch.eye(43, dtype=torch.float64)
    cov[3:, 3:] *= 0.25
    design = torch.cat([x, torch.eye(40, dtype=torch.float64)], 1)
    precision = cov.inverse() + design.mT @ design / 0.09
    mean = torch.linalg.solve(precision, design.mT @ y / 0.09)
    result = fit(local, (x, y), optimizer=bmr.adam(0.08), epochs=250)
    u = result.posterior["u"]
    torch.testing.assert_close(u.mean, mean[3:], atol=0.08, rtol=0)
    # of a mean field: the conditional variance
    torch.testing.assert_close(u.var, 1 / precision.diagonal()[3:], rtol=0.4, atol=0)
    bound = bmr.fitting.elbo_terms(local, result.guide, x, y)
    exact = torch.distributions.MultivariateNormal(
        torch.zeros(40).double(), design @ cov @ design.mT + 0.09 * torch.eye(40).double()
    ).log_prob(y)
    # one draw
    assert (
        float(exact) - 25
        < float((bound.expected_log_likelihood - bound.kl).detach())
        < float(exact) + 12
    )


def test_held_out_rows_have_no_latent_entries():
    with pytest.raises(bmr.errors.FitError, match="validation: site 'u' has entries per row"):
        fit(local, (X, Y), validation=(X[:5], Y[:5]))


@pytest.mark.parametrize("rows", [1, 20, 80])
@pytest.mark.parametrize("program", [local, groups])
def test_predictions_at_other_rows_are_refused_by_name(program, rows):
    posterior = fit(program, (X, Y)).posterior
    assert bmr.predict(program, posterior, X).mean.shape == (40,)
    with pytest.raises(bmr.errors.ModelError, match=r"site 'u' has shape \((40|8),\) in the"):
        bmr.predict(program, posterior, torch.cat([X, X])[:rows])


def test_a_plate_of_outputs_as_long_as_the_tried_rows_is_no_plate_of_rows():
    def outputs(x, y=None):
        with pyro.plate("outputs", 8, dim=-2):
            b = pyro.sample("b", dist.Normal(x.new_zeros(1), 1.0))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample(
                    "y", dist.Normal(x[:, 0] + b, 0.5), obs=None if y is None else y.expand(8, -1)
                )

    posterior = fit(outputs, (X, Y)).posterior
    assert posterior["b"].of_rows is None and bmr.predict(outputs, posterior, X[:5]).mean.shape == (
        5,
        8,
    )


def test_as_many_other_rows_are_other_rows(tmp_path):
    posterior = fit(local, (X, Y)).posterior
    posterior.save(tmp_path / "posterior.safetensors")
    for one in (posterior, bmr.Posterior.load(tmp_path / "posterior.safetensors")):
        assert one["w"].of_rows is None and bmr.predict(local, one, X.double()).mean.shape == (40,)
        with pytest.raises(
            bmr.errors.ModelError, match="site 'u'.*an entry for each row of the fit"
        ):
            bmr.predict(local, one, X.flip(0))


def test_a_site_that_changes_its_shape_during_a_fit_is_named():
    calls = []

    def changing(x, y=None):
        calls.append(len(x))
        w = pyro.sample("w", dist.Normal(x.new_zeros(3 if len(calls) < 12 else 1), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal((x * w).sum(1), 0.5), obs=y)

    for guide in (bmr.MeanField, bmr.FullRank, AutoNormal):
        calls.clear()
        with pytest.raises(
            bmr.errors.ModelError, match=r"site 'w'.*\(3,\).*\(1,\)|site 'w'.*\(1,\).*\(3,\)"
        ):
            fit(changing, (X, Y), guide=guide, epochs=20)


@pytest.mark.parametrize("guide", others_slow([AutoNormal, AutoDiagonalNormal], AutoNormal))
def test_guides_of_two_fits_stay_apart(guide):
    first, second = (
        fit(linear, (X, sign * Y), guide=guide, epochs=30, optimizer=bmr.adam(0.1))
        for sign in (1, -1)
    )
    for result in (first, second, first):
        read = bmr.Posterior.from_guide(result.guide, linear, X, Y)
        torch.testing.assert_close(read["b"].mean, result.posterior["b"].mean)
    assert first.posterior["b"].mean > 0.5 and second.posterior["b"].mean < -0.5


def test_the_rows_of_a_table_are_not_taken_for_a_pair():
    frame = np.zeros((2, 3))
    for data, words in ((frame, "ndarray"), (X, "Tensor")):
        with pytest.raises(
            bmr.errors.DataError, match=rf"data: expected a pair \(x, y\) of tensors.*got .*{words}"
        ):
            fit(linear, data)
    with pytest.raises(bmr.errors.DataError, match="under 'labels', got a dict with the keys 'x'"):
        fit(linear, {"x": X, "y": Y})


@pytest.mark.slow
def test_a_program_that_needs_all_its_rows_is_fitted_to_them():
    generator = torch.Generator().manual_seed(5)
    near = torch.exp(-(torch.arange(30.0)[:, None] - torch.arange(30.0)).abs() / 2)
    chol = torch.linalg.cholesky(0.3 * near + 0.1 * torch.eye(30))
    x = torch.randn(30, 1, generator=generator)
    y = 0.7 * x[:, 0] + chol @ torch.randn(30, generator=generator)

    def field(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 0.6))
        return pyro.sample("y", dist.MultivariateNormal(w * x[:, 0], scale_tril=chol), obs=y)

    fit = bmr.fit(
        field, (x, y), epochs=1000, batch_size=30, optimizer=bmr.adam(1e-2), progress=False
    )
    solved = torch.cholesky_solve(torch.stack([x[:, 0], y], 1), chol)
    precision = x[:, 0] @ solved[:, 0] + 1 / 0.6**2
    assert (
        abs(fit.posterior["w"].mean - x[:, 0] @ solved[:, 1] / precision) < 0.1 / precision.sqrt()
    )
    assert fit.posterior["w"].var == pytest.approx(float(1 / precision), rel=0.1)
    with pytest.raises(bmr.errors.FitError, match="does not run as program"):
        bmr.fit(field, (x, y), epochs=1, batch_size=15, progress=False)


@pytest.mark.parametrize("per_row", [False, True])
def test_a_program_that_needs_many_rows_is_tried_on_a_batch(per_row):
    x, y = torch.randn(64, 1, generator=torch.Generator().manual_seed(6)), torch.zeros(64)

    def program(x, y=None):
        assert len(x) >= 12, "too few"
        w = pyro.sample("w", dist.Normal(torch.zeros(len(x) if per_row else 1), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y)

    def fit(batch_size):
        return bmr.fit(
            program,
            (x, y),
            epochs=1,
            batch_size=batch_size,
            progress=False,
            validation=None if per_row else (x[:20], y[:20]),
        )

    assert fit(64).posterior["w"].mean.shape == (64 if per_row else 1,)
    with pytest.raises(
        bmr.errors.FitError,
        match=r"does not run as program\(x, y\) on x of shape \(8, 1\).*too few",
    ):
        fit(8)
    if per_row:
        with pytest.raises(
            bmr.errors.FitError, match="site 'w': its shape depends on the rows of the batch"
        ):
            fit(32)
    else:
        assert fit(32).history["step"].tolist() == [2]
