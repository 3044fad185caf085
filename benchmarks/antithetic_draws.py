"""What antithetic pairs of draws gain in a prediction over independent draws.

    python benchmarks/antithetic_draws.py --data fashion-mnist

A perceptron is fitted to 12,000 rows at most, and the class probabilities at 1,000 training rows
that the fit has not seen are averaged over few draws from the posterior. Printed are, over
repetitions: the root mean square error of the average and of the standard deviation of a
probability over draws, beside 3,000 independent draws, and the mean and standard deviation of the
NLL above that of those, in nats per row.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import pyro_bmr as bmr

Values = dict[str, Tensor]


def independent(posterior: bmr.Posterior, count: int, seed: int) -> Iterator[Values]:
    generator = torch.Generator().manual_seed(seed)
    return (posterior.draw(generator, weights=True) for _ in range(count))


def antithetic(posterior: bmr.Posterior, count: int, seed: int) -> Iterator[Values]:
    draws = posterior.draws(count, torch.Generator().manual_seed(seed))
    return (bmr.posteriors.weights.declared_weights(posterior.sites, values) for values in draws)


@torch.no_grad()
def probabilities(net: nn.Module, x: Tensor, draws: Iterator[Values]) -> Tensor:
    """(draws, rows, classes)."""
    names = [name for name, _ in net.named_parameters()]
    return torch.stack(
        [
            torch.func.functional_call(net, {n: values[n] for n in names}, (x,)).softmax(-1)
            for values in draws
        ]
    )


def nll(probs: Tensor, y: Tensor) -> float:
    return float(-probs.gather(1, y[:, None]).log().mean())


def compare(data: str, temperature: float, epochs: int, repetitions: int) -> None:
    loaded = bmr.load(data)
    x, y = loaded.x_train, loaded.y_train
    rows = min(len(x) - 200, 12_000)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(x[0].numel(), 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
        nn.Linear(100, loaded.outputs),
    )  # fmt: skip
    program = bmr.BayesianNetwork(net, bmr.Gaussian("layer"), bmr.Categorical())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bmr.errors.PyroBMRWarning)
        posterior = bmr.fit(
            program,
            (x[:rows], y[:rows]),
            epochs=epochs,
            optimizer=bmr.natural_gradient(),
            temperature=temperature,
            progress=False,
        ).posterior
    x, y = x[rows : rows + 1000], y[rows : rows + 1000]
    reference = probabilities(program.net, x, independent(posterior, 3000, 99))
    mean, spread = reference.mean(0), reference.std(0)
    print(f"\n{data}, T = {temperature}: standard deviation of a probability {spread.mean():.4f}")
    kinds: dict[str, Callable[..., Iterator[Values]]] = {
        "independent": independent,
        "antithetic": antithetic,
    }
    for count in (16, 32):
        for name, draws in kinds.items():
            found = []
            for seed in range(repetitions):
                probs = probabilities(program.net, x, draws(posterior, count, seed))
                own = probs.mean(0)
                found.append(
                    [
                        float((own - mean).square().mean().sqrt()),
                        float((probs.std(0, correction=0) - spread).square().mean().sqrt()),
                        nll(own, y) - nll(mean, y),
                    ]
                )
            each = torch.tensor(found, dtype=torch.float64)
            average, of_spread, excess = each.mean(0).tolist()
            print(
                f"| {count} | {name} | {average:.5f} | {of_spread:.5f} |"
                f" {excess:.5f} ± {each[:, 2].std():.5f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="the name of a data set with classes")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 0.1])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=12)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    for temperature in settings.temperatures:
        compare(settings.data, temperature, settings.epochs, settings.repetitions)


if __name__ == "__main__":
    main()
