"""Networks with draws of the posterior for weights."""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.models import mlp
from pyro_bmr.shrinking import plan
from pyro_bmr.shrinking.exported_graph import exported
from tests.exporting.networks import loaders


@pytest.fixture(scope="module")
def x():
    return bmr.load("digits").x_train[:40]


def test_an_ensemble_of_shrunk_draws(x, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(plan, "exported", lambda *args: read.append(args) or exported(*args))
    torch.manual_seed(0)
    program = bmr.BayesianNetwork(mlp.network(64, (30,), 10), bmr.Gaussian(0.5), bmr.Categorical())
    data = bmr.load("digits")
    fit = bmr.fit(
        program, (data.x_train[:200], data.y_train[:200]), epochs=3, batch_size=50, progress=False
    )
    masks = {
        name: torch.ones_like(site.mean, dtype=torch.bool)
        for name, site in fit.posterior.sites.items()
    }
    masks["1.weight"][:20] = masks["1.bias"][:20] = False
    posterior = fit.posterior.masked(masks)
    draws = bmr.exporting.ensemble(fit.program, posterior, draws=12, seed=1, example=x[:1])
    assert len(read) == 1  # the draws have one graph
    small = bmr.shrink(bmr.export(fit.program, posterior), {}, x[:1])
    assert {name: tuple(t.shape) for name, t in draws.items()} == {
        name: (12, *t.shape) for name, t in small.state_dict().items()
    }
    bmr.deploy(small, tmp_path, x, ensemble=draws, seconds=0)
    with torch.no_grad():
        mine = torch.stack([net(x).softmax(1) for net in loaders(tmp_path).load_ensemble()]).mean(0)
        want = bmr.predict(fit.program, posterior, x, draws=12, seed=1).probs
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-5)  # the same draws
        assert float((mine - small(x).softmax(1)).abs().max()) > 1e-3
    with pytest.raises(
        bmr.errors.ModelError, match="ensemble: expected draws of at least 1, got draws=0"
    ):
        bmr.exporting.ensemble(fit.program, posterior, draws=0)


def test_draws_that_shrink_to_different_shapes():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(), nn.Linear(72, 3)
    )
    sites = {n: bmr.Site(p.detach(), torch.full_like(p, 0.09)) for n, p in net.named_parameters()}
    program = bmr.BayesianNetwork(net, bmr.Gaussian(0.5), bmr.Categorical())
    masks = {"0.weight": torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 3, 3).clone()}
    posterior = bmr.Posterior(sites).masked(masks)
    with pytest.raises(bmr.errors.ModelError, match="shrink to different shapes"):
        bmr.exporting.ensemble(program, posterior, draws=12, example=torch.zeros(1, 1, 8, 8))
    assert bmr.exporting.ensemble(program, posterior, draws=12)["0.weight"].shape == (
        12,
        2,
        1,
        3,
        3,
    )
