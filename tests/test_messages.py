"""No message prints the numbers of what it was given: tensors, arrays, tables and modules in the
place of every argument that a message names.
"""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.experiments.shift import corrupted
from pyro_bmr.guides.low_rank_plus_diagonal import LowRankPlusDiagonal
from pyro_bmr.priors.tiers import check_tier

LONG = 1000
BIG = {
    "tensor": torch.linspace(0, 1, LONG),
    "array": np.linspace(0, 1, LONG),
    "table": pd.DataFrame({"x": np.linspace(0, 1, LONG), "y": 1.0}),
    "module": nn.Sequential(*(nn.Linear(3, 3) for _ in range(40))),
    "list": [torch.ones(LONG)] * 3,
    "dict": {"w": torch.ones(LONG)},
    "text": "x" * LONG,
}
WIDE = torch.ones(LONG)
NET = nn.Linear(3, 2)
X, Y = torch.randn(20, 3), torch.arange(20) % 2
GIVEN = bmr.Posterior.from_moments(
    {"w": torch.ones(4)}, {"w": torch.tensor(0.1)}, bmr.Gaussian(1.0)
)


def program(likelihood=None):
    return bmr.BayesianNetwork(
        NET, bmr.Gaussian(0.5), bmr.Categorical() if likelihood is None else likelihood
    )


def fit(**options):
    return bmr.fit(program(), (X, Y), **{"epochs": 1, "progress": False, **options})


CALLS = {
    **{
        f"Gaussian {name}": lambda big, name=name: bmr.Gaussian("layer", **{name: big})
        for name in ("mean", "concentration", "rate", "per", "block")
    },
    "Gaussian scale": lambda big: bmr.Gaussian(big),
    "Gaussian scale, mean": lambda big: bmr.Gaussian(big, mean=WIDE),
    "Gaussian layer, mean": lambda big: bmr.Gaussian("layer", mean=WIDE),
    "Laplace": lambda big: bmr.Laplace(big),
    "StudentT": lambda big: bmr.StudentT(scale=big),
    "StudentT df": lambda big: bmr.StudentT(df=big),
    **{
        f"Horseshoe {name}": lambda big, name=name: bmr.Horseshoe(**{name: big})
        for name in ("tau0", "slab_scale", "slab_df", "parametrization", "block")
    },
    "Horseshoe tiers": lambda big: bmr.Horseshoe(tiers=(big,)),
    "from_active": lambda big: bmr.Horseshoe.from_active(big, of=3, rows=3),
    **{
        f"SpikeAndSlab {name}": lambda big, name=name: bmr.SpikeAndSlab(**{name: big})
        for name in (
            "spike_scale",
            "alpha",
            "beta",
            "temperature",
            "per",
            "slab_scale",
            "inclusion",
        )
    },
    "check_tier": lambda big: check_tier(big, 1, "here"),
    **{
        f"Every {name}": lambda big, name=name: bmr.Every(**{name: big})
        for name in ("epochs", "start", "stop", "kept", "threshold")
    },
    "Block": lambda big: bmr.reduction.Block(big, 2),
    "NofM": lambda big: bmr.reduction.NofM(big, 4),
    "network": lambda big: bmr.BayesianNetwork(
        big if not isinstance(big, nn.Module) else {"net": big}, bmr.Gaussian(), bmr.Categorical()
    ),
    "likelihood": lambda big: program(big),
    "network prior": lambda big: bmr.BayesianNetwork(NET, {"weight": big}, bmr.Categorical()),
    **{
        f"fit {name}": lambda big, name=name: fit(**{name: big})
        for name in (
            "epochs",
            "batch_size",
            "seed",
            "temperature",
            "skip_faulty",
            "reduce",
            "start",
            "validation",
            "optimizer",
        )
    },
    "fit scheduler": lambda big: fit(scheduler=WIDE),
    "reduce to": lambda big: bmr.reduce(GIVEN, to=big if not isinstance(big, dict) else WIDE),
    "reduce to wide mean": lambda big: bmr.reduce(GIVEN, to=bmr.Gaussian(0.3, mean=WIDE)),
    "reduce per": lambda big: bmr.reduce(
        GIVEN, to=bmr.Gaussian(0), per=big if not isinstance(big, dict) else [WIDE]
    ),
    "reduce kept": lambda big: bmr.reduce(GIVEN, to=bmr.Gaussian(0), kept=big),
    "reduce heads": lambda big: bmr.reduce(GIVEN, to=bmr.Gaussian(0), heads=big),
    "reduce threshold": lambda big: bmr.reduce(GIVEN, to=bmr.Gaussian(0), threshold=big),
    "posterior": lambda big: bmr.reduce(big, to=bmr.Gaussian(0)),
    "moments prior": lambda big: bmr.Posterior.from_moments(
        {"w": torch.ones(4)}, {"w": torch.tensor(0.1)}, big
    ),
    "moments rows": lambda big: bmr.Posterior.from_moments(
        {"w": torch.ones(4)}, {"w": torch.tensor(0.1)}, bmr.Gaussian(1.0), rows=big
    ),
    "moments support": lambda big: bmr.Posterior.from_moments(
        {"w": torch.ones(4)}, {"w": torch.tensor(0.1)}, bmr.Gaussian(1.0), supports={"w": big}
    ),
    "temperature": lambda big: bmr.Posterior(GIVEN.sites, big),
    "curvature temperature": lambda big: bmr.Posterior.from_curvature(
        {"w": torch.ones(4)}, {"w": torch.ones(4)}, bmr.Gaussian(1.0), temperature=big
    ),
    "chains": lambda big: bmr.Posterior.from_samples(
        {"w": torch.randn(9, 4)}, bmr.Gaussian(1.0), chains=big
    ),
    "widened": lambda big: GIVEN.widened(big),
    "predict": lambda big: bmr.predict(program(), GIVEN, X, draws=big),
    "ensemble": lambda big: bmr.exporting.ensemble(program(), GIVEN, draws=big),
    "delta_f": lambda big: bmr.delta_f(
        bmr.formulas.Diagonal(WIDE, WIDE),
        big if not isinstance(big, dict) else WIDE,
        bmr.Gaussian(0),
    ),
    "log_prior_ratio": lambda big: bmr.reduction.reduction_program(GIVEN, "w", big),
    "natural gradient": lambda big: bmr.natural_gradient(big),
    "checkpoints": lambda big: bmr.Checkpoints("folder", every_steps=big),
    "low rank": lambda big: LowRankPlusDiagonal(program(), X, Y, rank=big),
    "severity": lambda big: corrupted(torch.zeros(2, 1, 8, 8), "gaussian_noise", big),
    "bins": lambda big: bmr.metrics.ece(torch.full((3, 2), 0.5), torch.tensor([0, 1, 0]), bins=big),
    "jobs": lambda big: bmr.study({}, "out", jobs=big),
    "estimator": lambda big: bmr.MeanField(program(), X, Y, estimator=big),
    "exact_inclusion": lambda big: bmr.formulas.exact_inclusion(torch.randn(3), alpha=big),
    "paired_loss": lambda big: bmr.prediction.paired_loss(big, big, Y),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_message_names_what_it_got_in_a_few_words(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, big in BIG.items():
        text = ""  # of a value that the argument takes
        try:
            CALLS[call](big)
        except bmr.PyroBMRError as error:
            text = str(error)
        assert len(text) < 400 and not re.search(r"tensor\(|array\(|0\.001|x{200}", text), (
            f"{kind}: {text}"
        )
