"""How often a fit keeps exactly the columns that matter, with the defaults of the command line:
`python benchmarks/kept_columns.py --out results/kept_columns` prints tables, and fits only what is
missing; with `--page` it fits nothing and fills the tables of docs/results/kept_columns.md.

y = x w + noise of standard deviation ½, n rows, of which a fifth is the test split, as in a table
that is read from a file. A seed draws the data as well. `DESIGNS` has w and the correlations of the
columns. The model is `linear_regression`, the settings are those of `compare` where none is given.
A count is that of the seeds in which all columns of the design are kept, and no other.

Routes are those of `compare`, and *after*: `Gaussian("layer")` is fitted without reductions and
reduced once, as by `pyro-bmr fit` and `pyro-bmr reduce --to`. *closed* has the same reductions
without the error of a fit: the best mean-field posterior under one empirical scale, in closed form,
reduced until nothing changes. It takes a fraction of a second, a fit some ten seconds. *window* is
the same with `reduce(..., window=True)` at the end.
*estimator* is `SparseRegressor` with its exact evidence of subsets, for comparison.

`--at-once` fits all seeds of a size in one fit (`parts/regressions_at_once.py`): as `compare` fits
them but for their random draws, at a fraction of the cost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts.pages import fill, table
from parts.regressions_at_once import fit_at_once, kept_of

import pyro_bmr as bmr
from pyro_bmr.data.standardised import split
from pyro_bmr.experiments.models import load_model
from pyro_bmr.experiments.recipe import fit_by_route
from pyro_bmr.experiments.settings import Settings
from pyro_bmr.reduction.reduce import quiet_reduction

PAGE = Path(__file__).parents[1] / "docs" / "results" / "kept_columns.md"
PRIORS = {
    "gaussian:layer": bmr.Gaussian("layer"),
    "gaussian": bmr.Gaussian(),
    "horseshoe": bmr.Horseshoe(),
    "spike-and-slab": bmr.SpikeAndSlab(),
}
_SHRINKAGE = ("horseshoe", "spike-and-slab")
DEFAULTS = ("gaussian:layer", *_SHRINKAGE)
ROUTES = (
    *((name, "reduced") for name in PRIORS),
    *((name, "fitted") for name in _SHRINKAGE),
    *((name, "after") for name in ("gaussian:layer", *_SHRINKAGE)),
    *((name, "closed") for name in ("gaussian", *_SHRINKAGE)),
    *((name, "window") for name in ("gaussian", "spike-and-slab")),
    ("estimator", "exact"),
)


def three(rng: np.random.Generator, n: int, p: int) -> tuple[np.ndarray, np.ndarray]:
    """x standard normal, y = 3x₀ − 2x₁ + x₂."""
    w = np.zeros(p)
    w[:3] = 3.0, -2.0, 1.0
    return rng.standard_normal((n, p)), w


def weak(rng: np.random.Generator, n: int, p: int) -> tuple[np.ndarray, np.ndarray]:
    """x standard normal, y = 0.6x₀ − 0.5x₁ + 0.4x₂, near the size of the noise."""
    w = np.zeros(p)
    w[:3] = 0.6, -0.5, 0.4
    return rng.standard_normal((n, p)), w


def correlated(rng: np.random.Generator, n: int, p: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring columns have correlation 0.7, and the first, the middle and the last matter."""
    noise = rng.standard_normal((n, p))
    x = noise.copy()
    for k in range(1, p):
        x[:, k] = 0.7 * x[:, k - 1] + np.sqrt(1 - 0.7**2) * noise[:, k]
    w = np.zeros(p)
    w[[0, p // 2, p - 1]] = 3.0, -2.0, 1.0
    return x, w


def half(rng: np.random.Generator, n: int, p: int) -> tuple[np.ndarray, np.ndarray]:
    """x standard normal, every other column matters, by between 0.5 and 2 in size."""
    w = np.zeros(p)
    w[::2] = rng.uniform(0.5, 2.0, len(w[::2])) * rng.choice([-1.0, 1.0], len(w[::2]))
    return rng.standard_normal((n, p)), w


def none(rng: np.random.Generator, n: int, p: int) -> tuple[np.ndarray, np.ndarray]:
    """x standard normal, no column matters."""
    return rng.standard_normal((n, p)), np.zeros(p)


DESIGNS = {design.__name__: design for design in (three, weak, correlated, half, none)}


def table_of(design: str, n: int, p: int, seed: int) -> tuple[bmr.Data, list[int]]:
    """The data, and which columns matter."""
    rng = np.random.default_rng([n, p, seed, list(DESIGNS).index(design)])
    x, w = DESIGNS[design](rng, n, p)
    return split("sparse", x, x @ w + 0.5 * rng.standard_normal(n)), w.nonzero()[0].tolist()


def target_of(prior: str) -> bmr.priors.Prior:
    return PRIORS[prior] if prior in _SHRINKAGE else bmr.Gaussian(scale=0.0)


def closed(data: bmr.Data, target: bmr.priors.Prior, window: bool = False) -> list[int]:
    """The columns left by repeated reductions of the best mean-field posterior, the last with a
    `window`.

    Its precisions are the diagonal of XᵀX/σ² + 1/s², its mean is that of the whole matrix. σ² and
    s² have the best evidence bound, by their fixed points.
    """
    x, y = data.x_train.double(), data.y_train.double().flatten()
    x, y, kept = x - x.mean(0), y - y.mean(), torch.ones(x.shape[1], dtype=torch.bool)
    while bool(kept.any()):
        mean, var, scale = _best_mean_field(x[:, kept], y)
        spread = [torch.zeros(len(kept), dtype=torch.float64) for _ in range(2)]
        for whole, part in zip(spread, (mean, var), strict=True):
            whole[kept] = part
        posterior = bmr.Posterior.from_moments(*({"w": t} for t in spread), bmr.Gaussian(scale))
        posterior = posterior.masked({"w": kept})
        found = quiet_reduction(posterior, to=target).masks["w"]
        if torch.equal(found, kept):
            kept = quiet_reduction(posterior, to=target, window=window).masks["w"]
            break
        kept = found
    return kept.nonzero()[:, 0].tolist()


def _best_mean_field(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Its means and variances, and s."""
    gram, h = x.T @ x, x.T @ y
    values, vectors = torch.linalg.eigh(gram)
    turned, noise, scale = vectors.T @ h, y.var(), torch.ones((), dtype=torch.float64)
    for _ in range(200):
        mean = vectors @ (turned / noise / (values / noise + 1 / scale))
        var = 1 / (gram.diagonal() / noise + 1 / scale)
        missed = (y - x @ mean).square().sum() + gram.diagonal() @ var
        noise, scale = missed / len(y), (mean.square() + var).mean()
    return mean, var, float(scale.sqrt())


def cell(prior: str, route: str, data: bmr.Data, seed: int) -> dict[str, Any]:
    """The columns that are kept, the seconds of the processor, and whether the fit converged."""
    clock = time.process_time()
    if route in ("closed", "window"):
        kept, converged = closed(data, target_of(prior), route == "window"), True
    elif route == "exact":
        x, y = (t.double().numpy() for t in (data.x_train, data.y_train.flatten()))
        found = bmr.SparseRegressor(random_state=seed).fit(x, y)
        kept, converged = np.flatnonzero(found.get_support()).tolist(), True
    else:
        declared = PRIORS["gaussian:layer"] if route == "after" else PRIORS[prior]
        done = fit_by_route(
            load_model("linear_regression"),
            data,
            declared,
            "fitted" if route == "after" else route,
            seed,
            Settings(),
            progress=False,
        )
        posterior, converged = done.posterior, done.fit.converged
        if route == "after":
            posterior = quiet_reduction(posterior, to=target_of(prior)).posterior
        kept = posterior["w"].kept.nonzero()[:, 0].tolist()
    return {"kept": kept, "converged": converged, "seconds": time.process_time() - clock}


def folder_of(out: Path, design: str, n: int, p: int, prior: str, route: str) -> Path:
    return out / design / f"{n}x{p}" / f"{prior.replace(':', '.')}_{route}"


def run(design: str, n: int, p: int, prior: str, route: str, seeds: int, out: Path) -> None:
    """Fits the seeds that have no file yet."""
    for seed in range(seeds):
        file = folder_of(out, design, n, p, prior, route) / f"{seed}.json"
        if not file.exists():
            data, _ = table_of(design, n, p, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(cell(prior, route, data, seed)))


AT_ONCE = ((tuple(DEFAULTS), "reduced"), *(((name,), "fitted") for name in _SHRINKAGE))


def run_at_once(design: str, n: int, p: int, seeds: int, out: Path) -> None:
    """The seeds of a size in one fit, if a file is missing; the three priors that are reduced to
    share it.
    """
    for priors, route in AT_ONCE:
        folders = [folder_of(out, design, n, p, prior, f"{route}.once") for prior in priors]
        if all((folder / f"{seeds - 1}.json").exists() for folder in folders):
            continue
        data = [table_of(design, n, p, seed)[0] for seed in range(seeds)]
        clock = time.process_time()
        rows = fit_at_once(data * len(priors), [q for q in priors for _ in data], route, 0)
        share = (time.process_time() - clock) / len(rows)
        for k, (prior, folder) in enumerate(zip(priors, folders, strict=True)):
            folder.mkdir(parents=True, exist_ok=True)
            for seed, one in enumerate(rows[k * seeds : (k + 1) * seeds]):
                kept, windowed = (kept_of(one, prior, route, window) for window in (False, True))
                found = {"kept": kept, "window": windowed, "seconds": share}
                (folder / f"{seed}.json").write_text(json.dumps(found))
        print(design, n, p, *priors, route, f"{share:.2f} s a seed", flush=True)


def at_once_rows(design: str, n: int, p: int, out: Path) -> list[list[str]]:
    """Rows of the table of fits at once."""
    found = []
    for prior, route in ((prior, route) for priors, route in AT_ONCE for prior in priors):
        files = sorted(folder_of(out, design, n, p, prior, f"{route}.once").glob("*.json"))
        cells = [(json.loads(file.read_text()), int(file.stem)) for file in files]
        if not cells:
            continue
        true = [set(table_of(design, n, p, seed)[1]) for _, seed in cells]
        kept, windowed = ([set(one[key]) for one, _ in cells] for key in ("kept", "window"))
        counts = [sum(map(set.__eq__, kept, true)), sum(map(set.__ge__, kept, true))]
        counts.append(sum(map(set.__eq__, windowed, true)))
        about = (design, str(n), str(p), prior, route)
        found.append([*about, *(f"{count} of {len(cells)}" for count in counts)])
    return found


COLUMNS = ("design", "n", "p", "prior", "route", "exact", "all true", "no other", "kept")
_MORE = ("converged", "s")
_CLOSED = ("closed", "window")
_ONCE = ("design", "n", "p", "prior", "route", "exact", "all true", "exact with the window")


def row(design: str, n: int, p: int, prior: str, route: str, out: Path) -> list[str] | None:
    """A row of the table, over the seeds that there are."""
    files = sorted(folder_of(out, design, n, p, prior, route).glob("*.json"))
    if not files:
        return None
    found = []
    for file in files:
        one, true = json.loads(file.read_text()), set(table_of(design, n, p, int(file.stem))[1])
        kept = set(one["kept"])
        found.append((kept == true, kept >= true, kept <= true, len(kept), *one.values()))
    exact, every, only, size, _, converged, seconds = zip(*found, strict=True)
    counted = (f"{sum(each)} of {len(files)}" for each in (exact, every, only))
    name = "" if route == "exact" else prior
    about = (design, str(n), str(p), name, "estimator" if route == "exact" else route)
    done = f"{sum(converged)} of {len(files)}", f"{np.mean(seconds):.1f}"
    return [*about, *counted, f"{np.mean(size):.1f}", *done]


def write_page(out: Path) -> None:
    """Fills the tables of the page from what there is."""
    cells = [
        (design, *map(int, folder.name.split("x")))
        for design in DESIGNS
        for folder in sorted(
            (out / design).glob("*x*"), key=lambda f: [*map(int, f.name.split("x"))]
        )
    ]
    for mark in ("closed", "fits"):
        routes = [one for one in ROUTES if (one[1] in _CLOSED) == (mark == "closed")]
        rows = [found for c in cells for one in routes if (found := row(*c, *one, out))]
        width = len(COLUMNS) if mark == "closed" else len(COLUMNS + _MORE)
        fill(PAGE, table((*COLUMNS, *_MORE)[:width], (one[:width] for one in rows)), mark)
    fill(PAGE, table(_ONCE, (one for c in cells for one in at_once_rows(*c, out))), "at once")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/kept_columns"))
    parser.add_argument("--designs", nargs="+", default=list(DESIGNS), choices=list(DESIGNS))
    parser.add_argument("--sizes", nargs="+", default=["200x10", "200x100"], metavar="NxP")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of PRIOR_ROUTE")
    parser.add_argument("--at-once", action="store_true", help="all seeds of a size in one fit")
    parser.add_argument("--page", action="store_true", help="fit nothing, only write the page")
    a = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for design, size in () if a.page else itertools.product(a.designs, a.sizes):
        n, p = map(int, size.split("x"))
        if a.at_once:
            run_at_once(design, n, p, a.seeds, a.out)
            continue
        for prior, route in ROUTES:
            if any(part in f"{prior}_{route}" for part in a.only):
                run(design, n, p, prior, route, a.seeds, a.out)
                print(*(row(design, n, p, prior, route, a.out) or ()), sep=" | ", flush=True)
    if a.page:
        write_page(a.out)


if __name__ == "__main__":
    main()
