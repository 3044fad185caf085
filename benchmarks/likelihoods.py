"""Every likelihood from data to plain torch: fit, validation, reduction, prediction, score, export.

    python benchmarks/likelihoods.py --real --epochs 40 --out docs/results/likelihoods.json \
        --page docs/results/likelihoods.md

Each row of the first table simulates data of known parameters (1,500 rows to train, 750 to test),
fits them with a fifth of the rows held out, reduces the weights to the point spike, predicts the
test rows, and exports the network, whose outputs it checks. It prints how far the parameters are
from the true ones, in standard deviations of the posterior; which weights are kept; the log score
beside that of the true parameters; and another proper score or the coverage of 90 % intervals. With
`--real` there is a second table, of data that scikit-learn and statsmodels (`pip install
statsmodels`) bring along, beside fits that do not see the inputs. Both take a minute of one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr import likelihoods
from pyro_bmr.prediction.class_prediction import ClassPrediction
from pyro_bmr.tracing import Values, likelihood_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.pages import fill, table
from benchmarks.parts.real_targets import REAL, mixed

TRAIN, TEST, INPUTS = 1500, 750, 6
STEPS = 600  # at least, also for a table of few rows
SLOPES = torch.tensor([0.8, -0.6, 0.5, 0.0, 0.0, 0.0])


class Case(NamedTuple):
    """Data with the true value of every site."""

    likelihood: Any
    net: nn.Module
    x: Tensor
    y: Tensor
    truth: dict[str, Any]
    columns: int = 0  # of x, first, that the network does not see


def inputs() -> tuple[Tensor, Tensor]:
    x = torch.randn(TRAIN + TEST, INPUTS)
    return x, x @ SLOPES


def linear(outputs: int = 1, bias: bool = True) -> nn.Linear:
    return nn.Linear(INPUTS, outputs, bias=bias)


def from_zero(net: Any) -> Any:
    """The network with weights of 0. A softmax knows differences between classes alone: what they
    share stays where it starts.
    """
    nn.init.zeros_(net.weight)
    return net


def real() -> Case:
    x, f = inputs()
    y = 0.3 + f + 0.5 * torch.randn(len(x))
    truth = {"weight": SLOPES[None], "bias": [0.3], "noise": 0.5}
    return Case(bmr.Normal(), linear(), x, y, truth)


def outliers() -> Case:
    x, f = inputs()
    y = 0.3 + f + 0.5 * torch.distributions.StudentT(3.0).sample((len(x),))
    truth = {"weight": SLOPES[None], "bias": [0.3], "noise": 0.5, "df": 3.0}
    return Case(likelihoods.StudentT(), linear(), x, y, truth)


def bits() -> Case:
    x, f = inputs()
    y = torch.bernoulli((2 * f - 0.4).sigmoid())
    return Case(bmr.Bernoulli(), linear(), x, y, {"weight": 2 * SLOPES[None], "bias": [-0.4]})


def counts() -> Case:
    x, f = inputs()
    time = 0.2 + 2 * torch.rand(len(x))
    y = torch.poisson(time * (f + 0.2).exp())
    truth = {"weight": SLOPES[None], "bias": [0.2]}
    x = torch.cat([time[:, None], x], 1)
    return Case(bmr.Poisson(exposure=0), linear(), x, y, truth, columns=1)


def spread_counts() -> Case:
    x, f = inputs()
    time = 0.5 + torch.rand(len(x))
    rate = torch.distributions.Gamma(1.5, 1.5 / (time * (f + 1.0).exp())).sample()
    truth = {"weight": SLOPES[None], "bias": [1.0], "concentration": 1.5}
    x = torch.cat([time[:, None], x], 1)
    likelihood = bmr.NegativeBinomial(exposure=0)
    return Case(likelihood, linear(), x, torch.poisson(rate), truth, columns=1)


def noise_of_inputs() -> Case:
    x, f = inputs()
    slopes = SLOPES.flip(0) * 0.6
    y = f + (x @ slopes - 0.7).exp() * torch.randn(len(x))
    truth = {"weight": torch.stack([SLOPES, slopes]), "bias": [0.0, -0.7]}
    return Case(bmr.Normal(noise="network"), linear(2), x, y, truth)


def two_outputs() -> Case:
    x, _ = inputs()
    both = torch.stack([SLOPES, -SLOPES.flip(0)])
    y = x @ both.T + torch.tensor([0.3, 1.2]) * torch.randn(len(x), 2)
    y[torch.rand(y.shape) < 0.1] = math.nan  # a tenth of the targets is missing
    truth = {"weight": both, "bias": [0.0, 0.0], "noise": [0.3, 1.2]}
    return Case(bmr.Normal(noise="per output", missing="ignore"), linear(2), x, y, truth)


def tokens() -> Case:
    """Four classes at ten positions, of which up to eight are padding."""
    x = torch.randn(TRAIN + TEST, 10, INPUTS)
    weights = torch.stack([SLOPES, -SLOPES, SLOPES.roll(1), -SLOPES.roll(1)])
    y = torch.distributions.Categorical(logits=x @ weights.T).sample()
    y[torch.arange(10) >= torch.randint(2, 11, (len(x), 1))] = -100
    likelihood = bmr.Categorical(ignore_index=-100)
    return Case(likelihood, from_zero(linear(4, bias=False)), x, y, {"weight": weights})


def pixels() -> Case:
    """Three classes at 8 × 8 pixels, from a convolution of two channels."""
    x = torch.randn((TRAIN + TEST) // 3, 2, 8, 8)
    net = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    weights = torch.zeros(3, 2, 3, 3)
    weights[1, 0, 1], weights[2, 0, 1] = 0.7, -0.7
    weights[0, 1, :, 1], weights[2, 1, :, 1] = 0.6, -0.6
    logits = nn.functional.conv2d(x, weights, padding=1)
    y = torch.distributions.Categorical(logits=logits.movedim(1, -1)).sample()
    return Case(bmr.Categorical(class_axis=1), from_zero(net), x, y, {"weight": weights})


def labels() -> Case:
    x, _ = inputs()
    weights = 1.5 * torch.stack([SLOPES, -SLOPES.flip(0), SLOPES.roll(3)])
    y = torch.bernoulli((x @ weights.T).sigmoid())
    return Case(bmr.Bernoulli(), linear(3), x, y, {"weight": weights, "bias": [0.0, 0.0, 0.0]})


def grades() -> Case:
    x, f = inputs()
    cuts = torch.tensor([-1.5, 0.0, 1.8])
    y = (2 * f + torch.logit(torch.rand(len(x))) > cuts[:, None]).sum(0)
    truth = {"weight": 2 * SLOPES[None], "lowest_class": float(cuts[0].sigmoid())}
    truth["gaps"] = [1.5, 1.8]
    return Case(bmr.Ordinal(4), linear(bias=False), x, y, truth)


CASES: dict[str, Callable[[], Case]] = {
    "normal": real,
    "Student-t": outliers,
    "Bernoulli": bits,
    "Poisson, exposure": counts,
    "negative binomial, exposure": spread_counts,
    "normal, noise of the inputs": noise_of_inputs,
    "two outputs, targets missing": two_outputs,
    "tokens with padding": tokens,
    "pixels": pixels,
    "many labels": labels,
    "grades": grades,
}


def errors(fit: bmr.Fit, truth: dict[str, Any]) -> tuple[float, str]:
    """The largest error of a weight, and the parameters of the likelihood: all in standard
    deviations of the posterior, on the scale on which it is Gaussian.
    """
    worst, words = 0.0, []
    for name, site in fit.posterior.sites.items():
        true = torch.as_tensor(truth[name], dtype=site.mean.dtype).expand(site.mean.shape)
        if site.support == "real":
            mean, true, sd = site.mean, true, site.var.sqrt()
            if isinstance(fit.program.likelihood, bmr.Categorical):  # softmax knows differences
                mean, true = mean - mean.mean(0), true - true.mean(0)
            worst = max(worst, float(((mean - true) / sd).abs().max()))
            continue
        value, upper = site.value(site.mean), site.value(site.mean + site.var.sqrt())
        scaled = {"positive": torch.log, "unit_interval": torch.logit}[site.support]
        z = ((scaled(value) - scaled(true)) / site.var.sqrt()).abs().max()
        numbers = zip(value.flatten(), (upper - value).flatten(), true.flatten(), strict=True)
        text = ", ".join(f"{v:.2f} ± {s:.2f} ({t:.2f})" for v, s, t in numbers)
        words.append(f"{name} {text}: {z:.1f} sd")
    return worst, "; ".join(words)


def further_score(prediction: Any, y: Tensor, likelihood: Any) -> tuple[str, float]:
    """Another score of the kind of target."""
    if isinstance(prediction, ClassPrediction):
        if isinstance(likelihood, bmr.Ordinal):
            return "ranked probability", bmr.metrics.ranked_probability(prediction.probs, y)
        known = y != -100
        return "Brier", bmr.metrics.brier(prediction.probs[known], y[known])
    if isinstance(likelihood, bmr.Bernoulli):
        return "Brier", bmr.metrics.binary_brier(prediction.mean, y)
    return "coverage of 90 %", bmr.metrics.coverage(*prediction.interval(0.9), y)


def fitted(case: Case, epochs: int, cut: int) -> tuple[bmr.Fit, bmr.Reduction, Any]:
    """The fit, its reduction, and the prediction of the rows after the first `cut`."""
    model = bmr.BayesianNetwork(case.net, bmr.Gaussian(1.5), case.likelihood)
    rows = (case.x[:cut], case.y[:cut])
    epochs = max(epochs, math.ceil(STEPS / max(cut * 0.8 // 128, 1)))
    settings = {"validation": 0.2, "optimizer": bmr.natural_gradient(), "progress": False}
    fit = bmr.fit(model, rows, epochs=epochs, **settings)
    reduction = bmr.reduce(fit.posterior, to=bmr.Gaussian(scale=0))
    return fit, reduction, bmr.predict(fit.program, reduction.posterior, case.x[cut:])


def check_export(case: Case, fit: bmr.Fit, reduction: bmr.Reduction, x: Tensor) -> None:
    """The exported network has the zeros of the masks, and gives the prediction at the means."""
    plain = bmr.export(fit.program, reduction.posterior)
    assert torch.equal(plain.weight != 0, reduction.masks["weight"])
    point = {name: site.value(site.mean) for name, site in reduction.posterior.sites.items()}
    with torch.no_grad(), Values(point) as run:
        fit.program(x)
    of_program = run.observed["y"]["fn"]
    seen = x[:, case.columns :] if case.columns else x
    with torch.no_grad(), Values(point) as run:
        case.likelihood.observe(plain(seen), None, **_read(case, x))
    of_plain = run.observed["y"]["fn"]
    y = of_program.sample()
    torch.testing.assert_close(of_plain.log_prob(y), of_program.log_prob(y), rtol=1e-4, atol=1e-4)


def _read(case: Case, x: Tensor) -> dict[str, Tensor]:
    return likelihoods.likelihood.read_inputs(case.likelihood, x)[1]


def row(name: str, epochs: int) -> dict[str, Any]:
    """One row of the table of simulated data."""
    torch.manual_seed(7)
    case = CASES[name]()
    cut = len(case.x) * TRAIN // (TRAIN + TEST)
    x, y = case.x[cut:], case.y[cut:]
    fit, reduction, prediction = fitted(case, epochs, cut)
    worst, parameters = errors(fit, case.truth)
    weight = torch.as_tensor(case.truth["weight"])
    if isinstance(case.likelihood, bmr.Categorical):
        weight = weight - weight.mean(0)
    mask, true = reduction.masks["weight"], weight.abs() > 1e-6
    like = {name: site.mean for name, site in fit.posterior.sites.items()}
    at = {
        k: torch.as_tensor(v, dtype=like[k].dtype).expand(like[k].shape)
        for k, v in case.truth.items()
    }
    with torch.no_grad(), Values(at) as run:
        fit.program(x, y)
    check_export(case, fit, reduction, x)
    score, value = further_score(prediction, y, case.likelihood)
    return {
        "likelihood": name,
        "worst weight, sd": worst,
        "parameters, true ones in brackets": parameters,
        "kept, not 0": f"{int((mask & true).sum())} / {int(true.sum())}",
        "kept, 0": f"{int((mask & ~true).sum())} / {int((~true).sum())}",
        "validation": float(fit.history["validation_nll"].iloc[-1]),
        "log score": float(prediction.log_prob(y).sum()) / len(y),
        "of the truth": float(likelihood_of(run)) / len(y),
        "score": score,
        "value": value,
    }


def real_row(name: str, epochs: int) -> dict[str, Any]:
    """One row of the table of real data, beside a fit to the targets alone."""
    torch.manual_seed(7)
    likelihood, net, x, y, columns = REAL[name]()
    x, y = mixed(x, y)
    cut = len(y) * 2 // 3
    case = Case(likelihood, net, x, y, {}, columns)
    fit, reduction, prediction = fitted(case, epochs, cut)
    check_export(case, fit, reduction, x[cut:])
    alone = torch.cat([x[:, :columns], 0 * x[:, columns:]], 1) if columns else 0 * x
    without = fitted(case._replace(x=alone), epochs, cut)[2]
    score, value = further_score(prediction, y[cut:], likelihood)
    _, value_without = further_score(without, y[cut:], likelihood)
    mask = reduction.masks["weight"]
    return {
        "data": name,
        "rows": len(y),
        "kept": f"{int(mask.sum())} / {mask.numel()}",
        "log score": float(prediction.log_prob(y[cut:]).sum()) / (len(y) - cut),
        "without inputs": float(without.log_prob(y[cut:]).sum()) / (len(y) - cut),
        "score": score,
        "value": value,
        "value without inputs": value_without,
    }


def show(rows: list[dict[str, Any]]) -> None:
    with pd.option_context(
        "display.width", 250, "display.max_columns", 20, "display.max_colwidth", 90
    ):
        print(pd.DataFrame(rows).round(3).to_string(index=False))


def simulated_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of simulated data as a table of the page."""
    columns = ["likelihood", "largest error of a weight", "parameters of the likelihood"]
    columns += ["kept, not 0", "kept, 0", "log score", "of the truth", "another score"]
    return table(
        columns,
        (
            [
                row["likelihood"],
                f"{row['worst weight, sd']:.1f}",
                row["parameters, true ones in brackets"] or "—",
                row["kept, not 0"],
                row["kept, 0"],
                f"{row['log score']:.3f}",
                f"{row['of the truth']:.3f}",
                f"{row['score']} {row['value']:.3f}",
            ]
            for row in rows
        ),
    )


def real_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The rows of real data as a table of the page."""
    columns = ["data", "rows", "kept", "log score", "without inputs", "another score"]
    return table(
        [*columns, "without inputs"],
        (
            [
                row["data"],
                f"{row['rows']:,}",
                row["kept"],
                f"{row['log score']:.3f}",
                f"{row['without inputs']:.3f}",
                f"{row['score']} {row['value']:.3f}",
                f"{row['value without inputs']:.3f}",
            ]
            for row in rows
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    parser.add_argument("--page", type=Path, help="a page whose tables are filled")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--only", nargs="*", help="the rows to make, by name; all by default")
    parser.add_argument("--real", action="store_true", help="also those of real data")
    options = parser.parse_args()
    wanted = options.only or [*CASES, *(REAL if options.real else ())]
    rows = [row(name, options.epochs) for name in wanted if name in CASES]
    real = [real_row(name, options.epochs) for name in wanted if name in REAL]
    for found in (rows, real):
        if found:
            show(found)
    if options.page:
        fill(options.page, simulated_lines(rows), "simulated")
        fill(options.page, real_lines(real), "real")
    if options.out:
        text = json.dumps({"simulated": rows, "real": real}, indent=1, ensure_ascii=False)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
