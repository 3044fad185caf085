"""Selection, coverage and time of `SparseRegressor` and of others on simulated regressions:
`python benchmarks/estimators.py --out results/estimators.json`.

y = Xβ + ε with ε ~ N(0, 1). The columns of X have variance 1, and a correlation of ρ^|i−j| ("AR")
or of ρ ("equal"). A few coefficients have sizes between 0.5 and 2 and random signs, all others are
0.

`--methods` says which to run: ours, oracle, horseshoe, lasso, ard, sparsevb, horseshoe-glm, nuts.
The oracle is least squares on the active columns alone: what an interval can cover on these seeds.
sparsevb and bayesian-feature-selection (horseshoe-glm, and nuts, which keeps the columns whose 90 %
interval excludes 0) may be in an environment of their own, where this library is not needed. A
finished fit is not run again, and `--table` prints the table of all fits in the file. `--evidence`
compares ΔF with the exact change of log evidence. Seconds are CPU seconds of one thread; set
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np

CELLS = [
    (kind, rho, n, p, k)
    for n, p, k in [
        (100, 10, 3),
        (200, 50, 5),
        (100, 200, 4),
        (100, 1000, 4),
        (500, 500, 10),
        (1000, 2000, 10),
    ]
    for kind, rho in [("AR", 0.5), ("AR", 0.9), ("equal", 0.5)]
]
"""Design, ρ, rows, columns, active columns."""
WIDEST = {"ard": 500, "horseshoe": 200, "horseshoe-glm": 50, "nuts": 50}
"""Columns beyond which a method is not run: it would take many minutes a fit."""
Z90 = 1.6448536269514722


def problem(kind, rho, n, p, k, seed):
    """X, y, β."""
    rng = np.random.default_rng(seed)
    white = rng.standard_normal((n, p))
    if kind == "AR":
        x = white.copy()
        for j in range(1, p):
            x[:, j] = rho * x[:, j - 1] + np.sqrt(1 - rho**2) * white[:, j]
    else:
        x = np.sqrt(1 - rho) * white + np.sqrt(rho) * rng.standard_normal((n, 1))
    beta = np.zeros(p)
    beta[rng.choice(p, k, replace=False)] = rng.choice([-1, 1], k) * rng.uniform(0.5, 2, k)
    return x, x @ beta + rng.standard_normal(n), beta


def ours(x, y, prior="spike-and-slab"):
    import pyro_bmr as bmr

    model = bmr.SparseRegressor(prior=prior).fit(x, y)
    low, high = np.quantile(model.coef_draws_, [0.05, 0.95], axis=0)
    return model.kept_, model.coef_, low, high


def horseshoe(x, y):
    return ours(x, y, "horseshoe")


def oracle(x, y, beta):
    from scipy.stats import t

    active = beta != 0
    design = np.column_stack([np.ones(len(y)), x[:, active]])
    inverse = np.linalg.inv(design.T @ design)
    mean = inverse @ design.T @ y
    left, freedom = y - design @ mean, len(y) - design.shape[1]
    coef, half = np.zeros(len(beta)), np.zeros(len(beta))
    coef[active] = mean[1:]
    half[active] = t.ppf(0.95, freedom) * np.sqrt(left @ left / freedom * np.diag(inverse)[1:])
    return active, coef, coef - half, coef + half


def lasso(x, y):
    from sklearn.linear_model import LassoCV

    coef = LassoCV().fit(x, y).coef_
    return coef != 0, coef, None, None


def ard(x, y):
    from sklearn.linear_model import ARDRegression

    model = ARDRegression().fit(x, y)
    sd = np.zeros(x.shape[1])
    sd[model.lambda_ < model.threshold_lambda] = np.sqrt(model.sigma_.diagonal())
    return model.coef_ != 0, model.coef_, model.coef_ - Z90 * sd, model.coef_ + Z90 * sd


def sparsevb(x, y):
    from sparsevb import svb_fit_linear

    x, y = x - x.mean(0), y - y.mean()
    fit = svb_fit_linear(x, y)
    mu, sigma, gamma = (np.asarray(fit[name]) for name in ("mu", "sigma", "gamma"))
    draw = np.random.default_rng(0)
    draws = (draw.random((2000, len(mu))) < gamma) * draw.normal(mu, sigma, (2000, len(mu)))
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    return gamma > 0.5, gamma * mu, low, high


def horseshoe_glm(x, y):
    from bayesian_feature_selection import HorseshoeGLM
    from bayesian_feature_selection.config import InferenceConfig

    run = InferenceConfig(
        num_warmup=500, num_samples=1000, num_chains=1, use_gpu=False, progress_bar=False
    )
    model = HorseshoeGLM().fit(x, y, run)
    draws = np.asarray(model.mcmc.get_samples()["beta"])
    kept = model.get_feature_importance().sort_values("feature_idx")["selected"].to_numpy()
    return kept, draws.mean(0), *np.quantile(draws, [0.05, 0.95], axis=0)


def nuts(x, y):
    """The posterior of `horseshoe_glm`, with a rule of selection that knows no unit."""
    _, coef, low, high = horseshoe_glm(x, y)
    return (low > 0) | (high < 0), coef, low, high


METHODS = {
    "ours": ours,
    "oracle": oracle,
    "horseshoe": horseshoe,
    "lasso": lasso,
    "ard": ard,
    "sparsevb": sparsevb,
    "horseshoe-glm": horseshoe_glm,
    "nuts": nuts,
}


def fitted(method, x, y, beta):
    """Columns kept, coefficients, and the ends of their intervals."""
    return METHODS[method](x, y, *([beta] if method == "oracle" else []))


def scores(kept, coef, low, high, beta):
    active = beta != 0
    hits, false = int((kept & active).sum()), int((kept & ~active).sum())
    inside = None if low is None else (low <= beta) & (beta <= high)
    return {
        "true": hits,
        "false": false,
        "f1": 2 * hits / max(1, int(kept.sum()) + int(active.sum())),
        "coverage": None if inside is None else float(inside.mean()),
        "coverage_active": None if inside is None else float(inside[active].mean()),
        "coverage_kept": None if inside is None or not kept.any() else float(inside[kept].mean()),
        "rmse": float(np.sqrt(((coef - beta) ** 2).mean())),
    }


def table(done):
    """Means over the seeds, as Markdown."""
    groups: dict[tuple, list] = {}
    for key, row in done.items():
        kind, rho, n, p, k, _, method = key.split(" ")
        groups.setdefault((int(n), int(p), kind, float(rho), int(k), method), []).append(row)
    names = ["f1", "true", "false", "coverage", "coverage_active", "coverage_kept", "rmse"]
    heads = ["F1", "true", "false", "coverage", "of active", "of kept", "RMSE", "seconds", "seeds"]
    lines = [
        "| rows | columns | design | method | " + " | ".join(heads) + " |",
        "|" + "---|" * (4 + len(heads)),
    ]
    order = list(METHODS)
    for cell in sorted(groups, key=lambda c: (*c[:4], order.index(c[5]))):
        rows, (n, p, kind, rho, k, method) = groups[cell], cell
        parts = []
        for name in [*names, "seconds"]:
            values = [row[name] for row in rows if row[name] is not None]
            digits = {"true": 1, "false": 1, "seconds": 1, "rmse": 3}.get(name, 2)
            parts.append(f"{np.mean(values):.{digits}f}" if values else "")
        parts[1] += f" of {k}"
        lines.append(
            f"| {n} | {p} | {kind} {rho:g} | {method} | " + " | ".join(parts) + f" | {len(rows)} |"
        )
    return "\n".join(lines)


def log_evidence(x, y, columns):
    """log p(y | the columns) of the linear model with the noise and the slab integrated out, by the
    covariance of the rows, up to a constant.
    """
    from pyro_bmr.estimators.families import SLABS

    part, terms = x[:, columns], []
    for slab in SLABS:
        cov = np.eye(len(y)) + slab * part @ part.T
        half_log_det = 0.5 * np.linalg.slogdet(cov)[1]
        terms.append(-half_log_det - 0.5 * (len(y) - 1) * np.log(y @ np.linalg.solve(cov, y)))
    return float(np.logaddexp.reduce(terms))


def evidence(cell, seed):
    """How far ΔF of the estimators is from the exact change of log evidence, nats: the largest for
    a single column under the default, and that of the whole reduction under prior="gaussian", with
    its exact value.
    """
    import pyro_bmr as bmr

    x, y, _ = problem(*cell, seed)
    scaled, centred = (x - x.mean(0)) / x.std(0), y - y.mean()
    model = bmr.SparseRegressor().fit(x, y)
    here, off = log_evidence(scaled, centred, model.kept_), []
    for j in [*np.nonzero(model.kept_)[0], *np.nonzero(~model.kept_)[0][:5]]:
        other = model.kept_.copy()
        other[j] = ~other[j]
        change = log_evidence(scaled, centred, other) - here
        off.append(model.delta_f_[j] - (change if model.kept_[j] else -change))
    whole = bmr.SparseRegressor(prior="gaussian").fit(x, y)
    full = np.nonzero(whole.models_.all(1))[0]
    best = int(whole.model_probability_.argmax())
    found = float(
        np.log(whole.model_probability_[best]) - np.log(whole.model_probability_[full[0]])
    )
    every = np.ones(x.shape[1], dtype=bool)
    exact = log_evidence(scaled, centred, whole.models_[best])
    return np.abs(off).max(), found, exact - log_evidence(scaled, centred, every)


def evidence_table(widest, seeds):
    lines = [
        "| rows | columns | design | ΔF of a column, error | gain of the search | exact |",
        "|---|---|---|---|---|---|",
    ]
    for cell in CELLS:
        kind, rho, n, p, _ = cell
        if p <= widest:
            found = np.array([evidence(cell, seed) for seed in range(seeds)])
            largest, whole = found[:, 0].max(), found[np.abs(found[:, 1] - found[:, 2]).argmax()]
            lines.append(
                f"| {n} | {p} | {kind} {rho:g} | {largest:.0e} | {whole[1]:.1f} | {whole[2]:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/estimators.json"))
    parser.add_argument("--methods", nargs="+", default=["ours", "lasso", "ard"], choices=METHODS)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--widest", type=int, default=2000, help="skip cells with more columns")
    parser.add_argument(
        "--only", nargs=3, metavar=("ROWS", "COLUMNS", "DESIGN"), help="such as 100 10 equal"
    )
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--evidence", action="store_true", help="print ΔF beside the exact one")
    arguments = parser.parse_args()
    if arguments.evidence:
        print(evidence_table(arguments.widest, arguments.seeds))
        return
    for method in [] if arguments.table else arguments.methods:  # imports are not timed
        fitted(method, *problem("AR", 0.5, 40, 3, 1, 0))
    done = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for seed in range(0 if arguments.table else arguments.seeds):
        for cell in CELLS:
            if arguments.only and [str(cell[2]), str(cell[3]), cell[0]] != arguments.only:
                continue
            for method in arguments.methods:
                key = " ".join(map(str, (*cell, seed, method)))
                if key in done or cell[3] > min(arguments.widest, WIDEST.get(method, 10**6)):
                    continue
                x, y, beta = problem(*cell, seed)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    begun = time.process_time()
                    found = fitted(method, x, y, beta)
                    seconds = time.process_time() - begun
                done[key] = {**scores(*found, beta), "seconds": seconds}
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(done, indent=0))
    print(table(done))


if __name__ == "__main__":
    main()
