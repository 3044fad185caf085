"""A reduction looked at, partly taken, put after another, saved and loaded."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pyro_bmr as bmr
from pyro_bmr.formulas.gaussian import prune_subset
from pyro_bmr.posteriors.site import Site
from tests.exact import random_spd

RNG = np.random.default_rng(31)
PRIOR = bmr.formulas.Diagonal(
    torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.6, dtype=torch.float64)
)


def site(*shape, mask=None):
    mean = np.where(RNG.random(shape) < 0.5, RNG.normal(0, 0.9, shape), RNG.normal(0, 0.1, shape))
    return Site(
        torch.tensor(mean),
        torch.tensor(RNG.uniform(0.01, 0.2, shape)),
        PRIOR,
        bmr.Gaussian(1.6**0.5),
        mask=mask,
    )


POSTERIOR = bmr.Posterior(
    {
        "fc1.weight": site(4, 5),
        "fc1.bias": site(4),
        "fc2.weight": site(3, 4),
        "noise": Site(torch.tensor(0.1), torch.tensor(0.2), support="positive"),
    }
)
SPIKE = bmr.Gaussian(0)


def same(a, b):
    return all(
        torch.equal(getattr(a[name], part), getattr(b[name], part))
        for name in a
        for part in ("mean", "var", "kept")
    )


def test_a_part_of_a_reduction_leaves_the_rest_as_it_was():
    whole = bmr.reduce(POSTERIOR, to=SPIKE)
    part = whole.only("fc1.*")
    assert list(part.sites) == ["fc1.weight", "fc1.bias"]
    assert (
        part.delta_f
        == pytest.approx(whole.delta_f - whole.sites["fc2.weight"].delta_f)
        != whole.delta_f
    )
    assert (
        torch.equal(part.posterior["fc2.weight"].mean, POSTERIOR["fc2.weight"].mean)
        and part.posterior["fc2.weight"].mask is None
    )
    assert torch.equal(part.posterior["fc1.bias"].kept, whole.masks["fc1.bias"])
    assert whole.before is POSTERIOR
    with pytest.raises(bmr.errors.ReductionError, match="'fc3.*' matches no reduced site"):
        whole.only("fc3.*")


def test_two_reductions_are_one():
    first = bmr.reduce(POSTERIOR, to=SPIKE, threshold=1.0)
    second = bmr.reduce(first.posterior, to=SPIKE, kept=0.3)
    both = first.then(second)
    direct = bmr.reduce(POSTERIOR, to=SPIKE, kept=0.3)
    assert both.delta_f == pytest.approx(direct.delta_f, abs=1e-10) and both.before is POSTERIOR
    assert all(torch.equal(both.masks[name], direct.masks[name]) for name in direct.masks) and same(
        both.posterior, second.posterior
    )
    whole = bmr.reduce(POSTERIOR, to=SPIKE)
    parts = whole.only("fc1.*").then(whole.only("fc2.*"))
    assert parts.delta_f == pytest.approx(whole.delta_f) and same(parts.posterior, whole.posterior)
    chained = whole.only("fc1.*").then(
        bmr.reduce(whole.only("fc1.*").posterior, to={"fc2.*": SPIKE})
    )
    assert same(chained.posterior, whole.posterior)


def test_reductions_that_do_not_follow_are_refused():
    first = bmr.reduce(POSTERIOR, to=SPIKE)
    with pytest.raises(
        bmr.errors.ReductionError, match="site 'fc1.*': the second reduction did not start"
    ):
        first.then(bmr.reduce(POSTERIOR, to=SPIKE))
    other = bmr.Posterior({"fc1.weight": site(4, 5), "fc1.bias": site(4), "fc2.weight": site(3, 4)})
    with pytest.raises(bmr.errors.ReductionError, match="did not start"):
        first.then(bmr.reduce(other, to=SPIKE))


@pytest.mark.parametrize("per", ["weight", "unit"])
@pytest.mark.parametrize("to", [SPIKE, bmr.SpikeAndSlab(), bmr.Gaussian(0.5)])
def test_it_comes_back_from_disk(tmp_path, per, to):
    reduction = bmr.reduce(POSTERIOR, to=to, per=per)
    reduction.save(tmp_path / "reduction")
    loaded = bmr.Reduction.load(tmp_path / "reduction")
    assert loaded.table().equals(reduction.table()) and loaded.delta_f == reduction.delta_f
    assert same(loaded.posterior, reduction.posterior) and same(loaded.before, reduction.before)
    assert all(
        torch.equal(loaded.sites[name].spike_delta_f, result.spike_delta_f)
        for name, result in reduction.sites.items()
    )
    assert (
        loaded.only("fc1.weight").then(loaded.only("fc2.weight")).kept
        == reduction.only("fc1.weight", "fc2.weight").kept
    )
    assert sorted(path.name for path in (tmp_path / "reduction").iterdir()) == [
        "after.safetensors",
        "before.safetensors",
        "reduction.json",
        "sites.safetensors",
    ]


def test_what_loading_refuses(tmp_path):
    with pytest.raises(bmr.errors.ReductionError, match="not a saved reduction"):
        bmr.Reduction.load(tmp_path)
    reduction = bmr.reduce(POSTERIOR, to=SPIKE)
    reduction.save(tmp_path)
    (tmp_path / "reduction.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(bmr.errors.ReductionError, match="expected the format .*, got 'other'"):
        bmr.Reduction.load(tmp_path)


def test_the_curve_is_the_delta_f_of_every_size():
    dead = torch.rand(4, 5) < 0.8
    posterior = bmr.Posterior({"a": site(4, 5, mask=dead), "b": site(3)})
    reduction = bmr.reduce(posterior, to=SPIKE)
    curve = reduction.curve(points=30)
    gains = torch.cat(
        [
            bmr.reduce(posterior, to=SPIKE)
            .sites[name]
            .spike_delta_f[posterior[name].kept]
            .flatten()
            for name in ("a", "b")
        ]
    )
    gains = gains.sort(descending=True).values
    before = int((~dead).sum())
    for pruned, kept, delta_f in curve.itertuples(index=False):
        assert delta_f == pytest.approx(
            float(gains[: int(pruned) - before].sum()), abs=1e-9
        ) and kept == pytest.approx(1 - pruned / 23)
    assert (
        curve["delta_f"].max() == pytest.approx(reduction.delta_f, abs=1e-9)
        and curve["pruned"].iloc[-1] == 23
        and len(curve) == len(gains) + 1
    )
    axes = reduction.plot()
    assert axes.lines[-1].get_ydata()[0] == reduction.delta_f and len(
        axes.lines[0].get_xdata()
    ) == len(curve)
    plt.close(axes.figure)


def test_the_curve_of_groups_and_of_correlations_is_joint():
    cov = torch.tensor(random_spd(RNG, 6, 0.2))
    mean = torch.tensor(RNG.normal(size=6) * 0.5)
    posterior = bmr.Posterior(
        {
            "w": Site(
                mean.view(3, 2),
                cov.diagonal().view(3, 2),
                PRIOR,
                joint=bmr.formulas.Dense(mean, cov),
            )
        }
    )
    curve = bmr.reduce(posterior, to=SPIKE, per="unit").curve()
    assert curve["pruned"].tolist() == [0, 2, 4, 6]
    everything = prune_subset(
        bmr.formulas.Dense(mean, cov), PRIOR_OF_SIX, torch.ones(6, dtype=torch.bool)
    )[0]
    assert (
        curve["delta_f"].iloc[-1] == pytest.approx(everything.item(), abs=1e-9)
        and curve["delta_f"].iloc[0] == 0
    )


PRIOR_OF_SIX = bmr.formulas.Diagonal(PRIOR.mean.expand(6), PRIOR.var.expand(6))


def test_the_decisions_have_the_name_of_earlier_versions_on_disk(tmp_path):
    """So that folders saved by 0.2 can be read."""
    reduction = bmr.reduce(POSTERIOR, to=SPIKE)
    reduction.save(tmp_path)
    names = {key.rpartition("/")[2] for key in load_file(tmp_path / "sites.safetensors")}
    assert names == {"drop", "spike_delta_f"}
