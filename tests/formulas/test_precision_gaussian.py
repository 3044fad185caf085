"""Every Gaussian formula against 200 digits on thousands of points, in float32 and in float64.

The answers are in `tests/reference/`, beside the programs that made them. The inputs are numbers of
the dtype, so an answer in float32 must be the exact one rounded once. In float64 a bound is a
number of roundings of what the formula must add up: it is stated with each.
"""

from functools import cache
from itertools import islice

import mpmath as mp
import numpy as np
import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.formulas.gaussian import point_spike_delta_f
from pyro_bmr.formulas.matrix_blocks import reduced_mean, reduced_var
from pyro_bmr.formulas.message import Message, log_evidence_ratio
from pyro_bmr.formulas.relevance import best_var
from tests.parameters import others_slow
from tests.reference import gaussian
from tests.reference import gaussian_grid as grid

EPS = {"float32": 2.0**-24, "float64": 2.0**-53}
ANSWERS = np.load(gaussian.FILE)
# problems with correlations that the fast suite takes; odd, as their shapes take turns
EVERY = 49


def close(got, want, dtype, relative=2.0, absolute=0.0):
    """Within `relative` roundings of the answer, and an absolute bound. Where the answer is outside
    the dtype's range, nothing is asked here.
    """
    got, want = (np.asarray(x, dtype=np.float64) for x in (got, want))
    assert got.shape == want.shape and len(got)
    info = np.finfo(grid.DTYPES[dtype])
    bound = relative * EPS[dtype] * np.abs(want) + absolute + float(info.smallest_subnormal)
    off = np.isfinite(want) & ~(np.abs(got - want) <= bound)
    assert not off.any(), (
        f"{off.sum()} of {len(got)} points, the first {np.flatnonzero(off)[0]}: {got[off][0]!r} for"
        f" {want[off][0]!r}"
    )


def tensors(columns, rows=slice(None)):
    return [torch.as_tensor(column[rows]) for column in columns.values()]


@pytest.fixture(params=grid.DTYPES)
def dtype(request):
    return request.param


def pairs(columns):
    return [Diagonal(*columns[k : k + 2]) for k in range(0, len(columns), 2)]


def test_one_weight(dtype):
    """ΔF within 1e-10 nats and 1e-13 of itself; moments to the last digits, the mean to 1e-11 of
    the largest of the three.
    """
    columns, want = grid.weights(dtype), ANSWERS[f"{dtype}_weights"]
    fine = np.isfinite(want[:, 0])
    q, p, p_ = pairs(tensors(columns, fine))
    got = bmr.delta_f(q, p, p_)
    energies = (
        columns["prior_mean"].astype(np.float64) ** 2
        + columns["reduced_mean"].astype(np.float64) ** 2
    )
    terms = (energies / columns["prior_var"].astype(np.float64))[fine]
    assert str(got.dtype) == f"torch.{dtype}" and len(got) > 2000
    close(
        got,
        want[fine, 0],
        dtype,
        4 if dtype == "float32" else 1000,
        1e-10 + 1e-13 * np.minimum(terms, 1e6),
    )
    reduced = bmr.formulas.reduced_posterior(q, p, p_)
    largest = (
        np.abs(np.stack([columns[k] for k in ("mean", "prior_mean", "reduced_mean")]))
        .max(0)
        .astype(np.float64)[fine]
    )
    close(reduced.mean, want[fine, 1], dtype, 2, 1e-11 * largest)
    close(reduced.var, want[fine, 2], dtype, 8)


def test_messages_of_one_weight(dtype):
    columns, want = grid.weights(dtype), ANSWERS[f"{dtype}_weights"]
    fine = np.isfinite(want[:, 3:5]).all(1)
    q, p, _ = pairs(tensors(columns, fine))
    data = bmr.formulas.message(q, p)
    close(data.h, want[fine, 3], dtype, 3)
    close(data.precision, want[fine, 4], dtype, 4)
    assert fine.sum() > 2000


def test_point_spikes(dtype):
    """A prior mean of 0 goes through the form for many weights, in float32 throughout: within a few
    roundings of its two terms.
    """
    columns, want = grid.weights(dtype), ANSWERS[f"{dtype}_weights"][:, 5]
    fine = np.isfinite(want)
    q, p, _ = pairs(tensors(columns, fine))
    close(point_spike_delta_f(q, p), want[fine], dtype, 64, 1e-10)
    centred = fine & (columns["prior_mean"] == 0)
    q, p, _ = pairs(tensors(columns, centred))
    logs = np.abs(np.log(columns["var"][centred].astype(np.float64))) + np.abs(
        np.log(columns["prior_var"][centred].astype(np.float64))
    )
    got = point_spike_delta_f(q, Diagonal(torch.zeros((), dtype=q.mean.dtype), p.var))
    close(got, want[centred], dtype, 4, 4 * EPS[dtype] * logs)
    assert np.all(
        np.abs(got.numpy() - want[centred]) <= np.maximum(1e-4 * np.abs(want[centred]), 1e-5)
    )


def test_evidence_ratios_and_best_variances_of_messages(dtype):
    """In float64 the message itself limits them: h − Le has the rounding of Le, whose square in
    units of 1/L counts.
    """
    columns, want = grid.messages(dtype), ANSWERS[f"{dtype}_messages"]
    h, precision, prior_var, reduced_var, shift = tensors(columns)
    lam, e = (columns[k].astype(np.float64) for k in ("precision", "shift"))
    about = np.abs(columns["h"].astype(np.float64) - lam * e)
    lost = np.abs(lam * e) * 2.0**-51
    nats = lost * (about + lost) / np.abs(lam) + 1e-13
    close(
        log_evidence_ratio(Message(h, precision), prior_var, reduced_var, shift),
        want[:, 0],
        dtype,
        8,
        nats + 1e-12,
    )
    best = best_var(Message(h, precision), prior_var, shift=shift)
    spoken = lam > 0
    close(
        best.var.numpy()[spoken],
        want[spoken, 1],
        dtype,
        8,
        (1e-15 * (about / lam) ** 2 + lost * (about + lost) / lam**2)[spoken],
    )
    close(best.delta_f.numpy()[spoken], want[spoken, 2], dtype, 8, (nats + 1e-12)[spoken])
    assert not best.delta_f[~torch.as_tensor(spoken)].any()


@cache
def problems_of(kind, dtype):
    return list(getattr(grid, kind)(dtype))


def structure(kind, one):
    """Posterior, prior, reduced prior and what is pruned, as the library has them."""
    t = {key: torch.as_tensor(value) for key, value in one.items()}
    if kind == "dense":
        return (
            *(
                bmr.formulas.Dense(t[f"{role}mean"], t[f"{role}cov"])
                for role in ("", "prior_", "reduced_")
            ),
            t["pruned"],
        )
    q = (
        bmr.formulas.LowRank(t["mean"], t["var"], t["factor"])
        if kind == "low_rank"
        else bmr.formulas.MatrixNormal(t["mean"], t["row_cov"], t["col_cov"])
    )
    return (
        q,
        Diagonal(t["prior_mean"], t["prior_var"]),
        Diagonal(t["reduced_mean"], t["reduced_var"]),
        t["pruned"],
    )


def covariance(g):
    if isinstance(g, bmr.formulas.Dense):
        return g.cov.double()
    return (
        g.var.double().diag() + g.factor.double() @ g.factor.double().mT
        if isinstance(g, bmr.formulas.LowRank)
        else torch.kron(g.row_cov.double(), g.col_cov.double())
    )


# of ΔF in float64: 2⁻⁵³ times condition numbers of 1e8
CONDITION = {"dense": 1e-7, "low_rank": 1e-8, "matrix_normal": 1e-8}


@pytest.mark.parametrize("dtype", others_slow([*grid.DTYPES], "float64"), indirect=True)
@pytest.mark.parametrize(
    "every", [EVERY, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"]
)
@pytest.mark.parametrize("kind", CONDITION)
def test_correlated_weights(dtype, kind, every):
    want = ANSWERS[f"{dtype}_{kind}_delta_f"][::every]
    problems = [structure(kind, one) for one in problems_of(kind, dtype)[::every]]
    exists = np.isfinite(want[:, 0])
    got = [
        bmr.delta_f(*problem[:3]).item()
        for problem, there in zip(problems, exists, strict=True)
        if there
    ]
    close(
        got,
        want[exists, 0],
        dtype,
        2 + CONDITION[kind] / 2**-53 * (dtype == "float64"),
        CONDITION[kind],
    )
    gains = [bmr.formulas.prune_subset(q, p, pruned)[0].item() for q, p, _, pruned in problems]
    close(
        gains,
        want[:, 1],
        dtype,
        2 + CONDITION[kind] / 2**-53 * (dtype == "float64"),
        CONDITION[kind],
    )
    for problem in [problem for problem, there in zip(problems, exists, strict=True) if not there][
        :3
    ]:
        with pytest.raises(
            bmr.errors.ReductionError,
            match="not positive definite: the posterior is wider than its prior",
        ):
            bmr.delta_f(*problem[:3])


@pytest.mark.parametrize("dtype", others_slow([*grid.DTYPES], "float64"), indirect=True)
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("kind", CONDITION)
def test_reduced_moments_of_correlated_weights(dtype, kind, every):
    """Means within 1e-4 standard deviations or 1e-10 of themselves, covariances within 1e-6 of the
    variances, beside the rounding of the dtype.
    """
    answers, problems = iter(ANSWERS[f"{dtype}_{kind}_moments"]), problems_of(kind, dtype)
    points = 0
    for k, one in enumerate(problems[:: len(problems) // gaussian.MOMENTS]):
        sizes = (
            one["mean"].size,
            int((~one["pruned"]).sum()) * (one["mean"].shape[1] if kind == "matrix_normal" else 1),
        )
        wants = [np.array(list(islice(answers, d + d * (d + 1) // 2))) for d in sizes]
        if k % every == 0:
            q, p, p_, pruned = structure(kind, one)
            rest = bmr.formulas.prune_subset(q, p, pruned)[1]
            points += compared(dtype, wants[1], rest.mean.flatten(), covariance(rest))
            if np.isfinite(wants[0]).all() and kind == "matrix_normal":
                points += compared(
                    dtype,
                    wants[0],
                    reduced_mean(q, p, p_).flatten(),
                    reduced_var(q, p, p_).flatten(),
                )
            elif np.isfinite(wants[0]).all():
                reduced = bmr.formulas.reduced_posterior(q, p, p_)
                points += compared(dtype, wants[0], reduced.mean, covariance(reduced))
    assert points > 2000 / every


def compared(dtype, want, mean, cov):
    """How many numbers of a reduced posterior were held against their answers; `cov` may be the
    variances alone.
    """
    d = len(mean)
    row, column = np.tril_indices(d)
    want_mean, triangle = want[:d], want[d:]
    sd = np.sqrt(triangle[row == column])
    # with condition numbers of 1e8 rounding alone is 2e-8
    close(mean, want_mean, dtype, 4, 1e-4 * sd + 1e-10 * np.abs(want_mean))
    if cov.ndim == 1:
        close(cov, triangle[row == column], dtype, 4, 1e-6 * sd**2)
        return 2 * d
    close(
        cov.numpy()[row, column], triangle, dtype, 4, (1e-6 + 4 * EPS[dtype]) * sd[row] * sd[column]
    )
    return len(want)


@pytest.mark.parametrize("dtype", others_slow([*grid.DTYPES], "float32"), indirect=True)
@pytest.mark.parametrize("some", [22, pytest.param(gaussian.SEARCHED, marks=pytest.mark.slow)])
def test_all_models_of_a_search(dtype, some):
    """The searches answer in float64 whatever the dtype of the posterior: to 1e-5 nats, or 1e-6 of
    the loss of a bad model.
    """
    # gaussian.searched(dtype), of problems that are there already
    searched = [one for one in problems_of("dense", dtype) if len(one["mean"]) == 5]
    for one, want in zip(searched[:some], ANSWERS[f"{dtype}_models"], strict=False):
        q, p, *_ = structure("dense", one)
        for search in (bmr.reduction.exhaustive_search(q, p), bmr.reduction.greedy_search(q, p)):
            at = {gone: k for k, gone in enumerate(gaussian.subsets())}
            models = [at[tuple((~alive).nonzero()[:, 0].tolist())] for alive in search.kept]
            close(search.delta_f, want[models], "float64", 1e10, 1e-5)


def test_the_stored_answers_are_what_the_programs_give(dtype):
    """A few of each, by mpmath again."""
    rng = np.random.default_rng()
    for columns, answer in (
        (grid.weights(dtype), gaussian.weight),
        (grid.messages(dtype), gaussian.from_message),
    ):
        stored = ANSWERS[f"{dtype}_{'weights' if answer is gaussian.weight else 'messages'}"]
        for k in rng.integers(len(stored), size=12):
            again = np.array(
                [float(x) for x in answer(*(column[k] for column in columns.values()))]
            )
            seen = np.isfinite(stored[k])
            np.testing.assert_allclose(again[seen], stored[k][seen], rtol=1e-15)
    for kind in CONDITION:
        for k, one in (
            (k, one) for k, one in enumerate(islice(getattr(grid, kind)(dtype), 60)) if k % 30 == 7
        ):
            np.testing.assert_allclose(
                gaussian.structure(kind, one)[:2], ANSWERS[f"{dtype}_{kind}_delta_f"][k], rtol=1e-15
            )
    assert mp.mp.dps >= 50
