"""The baseline: gradual magnitude pruning of a point estimate in plain torch (Zhu & Gupta 2017),
without and with temperature scaling (Guo et al. 2017).

    python benchmarks/magnitude_pruning.py --kept 0.02 --seeds 3 \\
        --out results/fashion-mnist/magnitude-2

Global magnitude ranking over all weights and biases, cubic schedule, Adam with cosine decay, pruned
entries held at 0: the method "magnitude" of `pyro_bmr/baselines/magnitude.py`. The scaled variant
trains without a sixth of the training rows and fits one temperature there by NLL; the plain one
trains on all of them. Kept fraction 1 is the dense network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
import torch

import pyro_bmr as bmr
from pyro_bmr.experiments.measures import scores, sizes
from pyro_bmr.experiments.methods import method_named
from pyro_bmr.experiments.models import load_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--hidden", default="300-100")
    parser.add_argument("--kept", type=float, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--reduce-every", type=float, default=0.25, help="epochs between prunings")
    parser.add_argument("--start", type=float, default=0.0)
    parser.add_argument("--stop", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    data, build = bmr.load(settings.data), load_model(f"mlp:{settings.hidden}")
    options = {
        name: getattr(settings, name)
        for name in (
            "kept",
            "epochs",
            "batch_size",
            "learning_rate",
            "weight_decay",
            "start",
            "stop",
        )
    }
    rows = []
    for seed in range(settings.seeds):
        for calibrate in (False, True):
            trained = method_named("magnitude")(
                build,
                data,
                seed,
                {**options, "prune_every": settings.reduce_every, "calibrate": calibrate},
                True,
            )
            prediction = trained.predict(data.x_test)
            measured = {
                **scores(prediction, data),
                **sizes(trained.weights, trained.weights),
                **trained.extra,
            }
            result = {name: measured[name] for name in ("scale", "accuracy", "nll", "ece", "kept")}
            route = "temperature-scaled" if calibrate else "plain"
            rows.append(
                {
                    "prior": "none",
                    "route": route,
                    "seed": seed,
                    **result,
                    "seconds": trained.seconds,
                }
            )
            settings.out.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_csv(settings.out / "results.csv", index=False)
    (settings.out / "settings.json").write_text(
        json.dumps({k: str(v) for k, v in vars(settings).items()}, indent=1)
    )
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
