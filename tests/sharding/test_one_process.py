"""A sharded fit in one process: it is `fit`, and it refuses by name what it cannot do."""

import math
import threading

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.sharding import sharded_checkpoints, sharded_fit
from tests.sharding import group

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="needs torch 2.9"
)


def quick(prior, make, **arguments):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 2)).double()
    program = bmr.BayesianNetwork(net, prior, bmr.Categorical())
    data, settings = (
        (group.X, group.Y),
        {"epochs": 6, "batch_size": 25, "progress": False, "seed": 4},
    )
    return make(program, data, **settings, **arguments), program


@pytest.mark.filterwarnings("ignore:the fit has not converged")
@pytest.mark.parametrize(
    ("prior", "optimizer"),
    [
        (bmr.Gaussian(0.7, mean=0.1), bmr.adam(1e-2)),
        (bmr.Gaussian(), bmr.natural_gradient()),
        pytest.param(bmr.Gaussian(), bmr.adam(1e-2), marks=pytest.mark.slow),
        pytest.param(bmr.Gaussian(0.7, mean=0.1), bmr.natural_gradient(), marks=pytest.mark.slow),
    ],
)
def test_in_one_process_it_is_fit(alone, prior, optimizer):
    """The same numbers but for rounding, with masks and empirical scales."""
    schedule = bmr.Every(2, start=0, kept=0.4)
    one, _ = quick(prior, bmr.fit, optimizer=optimizer, reduce=schedule)
    ours, program = quick(prior, sharded_fit, optimizer=optimizer, reduce=schedule)
    gathered = ours.posterior.gathered()
    for name, site in one.posterior.sites.items():
        torch.testing.assert_close(gathered[name].mean, site.mean, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(gathered[name].var, site.var, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(gathered[name].prior.var, site.prior.var)
        assert torch.equal(gathered[name].kept, site.kept) and gathered[name].declared == prior
    for name, value in one.program.net.state_dict().items():
        if name.startswith("1."):  # the point estimates
            torch.testing.assert_close(ours.program.net.state_dict()[name], value)
    columns = ["elbo", "kept", "delta_f", "expected_log_likelihood", "kl"]
    assert ours.history[columns].to_numpy() == pytest.approx(one.history[columns].to_numpy())
    assert ours.scales.keys() == one.scales.keys()
    whole, drawn = ours.whole_program(program), {"draws": 3, "seed": 1}
    expected = bmr.predict(one.program, one.posterior, group.X, **drawn)
    found = bmr.predict(whole, gathered, group.X, **drawn)
    torch.testing.assert_close(found.probs, expected.probs)
    assert not torch.equal(whole.net[1].weight, program.net[1].weight)  # trained; a copy


@pytest.mark.filterwarnings("ignore:the fit has not converged")
def test_a_network_on_meta_starts_as_it_would_elsewhere(alone):
    expected = [p.clone() for p in group.network("cpu").parameters()]
    program = group.program("meta")
    assert all(p.is_meta for p in program.net.parameters())
    fit = sharded_fit(
        program, (group.X, group.Y), epochs=1, batch_size=101, seed=0, progress=False,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    )  # fmt: skip
    gathered = fit.posterior.gathered()
    assert torch.equal(gathered["3.weight"].mean, expected[4])
    assert torch.equal(gathered["0.bias"].mean, expected[1])
    torch.testing.assert_close(gathered["0.weight"].mean, expected[0] * math.sqrt(6))
    assert all(p.is_meta for p in program.net.parameters())


def test_what_is_not_shared_out_is_refused_by_name(alone):
    def refusal(prior=None, likelihood=None, **arguments):
        net = nn.Sequential(nn.Linear(6, 2))
        program = bmr.BayesianNetwork(net, prior or bmr.Gaussian(), likelihood or bmr.Categorical())
        with pytest.raises(bmr.errors.FitError) as raised:
            sharded_fit(program, (group.X.float(), group.Y), progress=False, **arguments)
        return str(raised.value)

    assert "'0.weight': a sharded fit expects a Gaussian(...)" in refusal(bmr.Horseshoe())
    assert "got Gaussian(" in refusal(bmr.Gaussian(per="unit"))
    assert "a number as its mean" in refusal(bmr.Gaussian(mean="init"))
    assert "without latent sites" in refusal(likelihood=bmr.Normal())
    noisy = bmr.Normal(noise="network")
    assert "temperature=0.5: a sharded fit expects 1" in refusal(likelihood=noisy, temperature=0.5)
    assert "micro_batches: expected a whole number of 1 or more" in refusal(micro_batches=0)
    for estimator in ("local", "flipout", "wieght", 1):
        assert "expects one of 'weight', 'antithetic'" in refusal(estimator=estimator)
    assert "per='weight', got per='unit'" in refusal(reduce=bmr.Every(1, per="unit"))
    with pytest.raises(bmr.errors.FitError, match="expects a BayesianNetwork"):
        sharded_fit(lambda x, y: None, (group.X, group.Y))


@pytest.mark.filterwarnings("ignore:the fit has not converged")
def test_reductions_that_need_all_weights_are_refused(alone):
    posterior = quick(bmr.Gaussian(), sharded_fit)[0].posterior
    for to in (bmr.SpikeAndSlab(), bmr.Gaussian(), {"*": bmr.Horseshoe()}):
        with pytest.raises(bmr.errors.ReductionError, match=r"reduce posterior\.gathered\(\)"):
            posterior.reduce(to)
    with pytest.raises(bmr.errors.ReductionError, match="a fraction between 0 and 1"):
        posterior.reduce(bmr.Gaussian(scale=0), kept=1.5)


def test_without_a_group_it_says_so():
    with pytest.raises(bmr.errors.FitError, match=r"init_process_group.*torchrun"):
        sharded_fit(group.program(), (group.X, group.Y))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit has not converged")
def test_a_damaged_part_is_not_read(alone, tmp_path):
    whole = group.tensors(group.saved(tmp_path / "run").posterior.gathered())
    part = next((tmp_path / "run" / "step-000000024").iterdir())
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    message = "step-000000024': 1 of 1 files are damaged or missing.*the one before is used"
    with pytest.warns(bmr.PyroBMRWarning, match=message):
        again = group.saved(tmp_path / "run")
    found = group.tensors(again.posterior.gathered())
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    with pytest.raises(bmr.errors.FitError, match=r"has checkpoints of another fit \(seed was 3"):
        group.saved(tmp_path / "run", seed=4)


@pytest.mark.filterwarnings("ignore:the fit has not converged")
def test_the_fit_goes_on_while_a_checkpoint_is_written(alone, tmp_path, monkeypatch):
    """The one before stays, and is what is read, until all of the new one is there."""
    begun, go_on, seen = threading.Event(), threading.Event(), []
    written = sharded_checkpoints.written_parts

    def held_back(folder, group):
        if folder.name == "step-000000006":
            begun.set()
            assert go_on.wait(60)
        return written(folder, group)

    def schedule(optimizer, steps):
        def rate(step):
            if step == 8 and not seen:  # while step 6 is being written
                assert begun.wait(60)
                seen.extend(sorted(path.name for path in tmp_path.glob("step-*")))
                go_on.set()
            return 1.0

        return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    monkeypatch.setattr(sharded_checkpoints, "written_parts", held_back)
    group.fit(
        epochs=3, scheduler=schedule,
        checkpoint=bmr.Checkpoints(tmp_path, every_steps=3, every_seconds=1e9),
    )  # fmt: skip
    whole = [f"step-00000000{k}{end}" for k in (1, 3) for end in ("", ".safetensors")]
    assert seen == [*whole, "step-000000006"]
    last = [f"step-0000000{k}{end}" for k in ("09", "12") for end in ("", ".safetensors")]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == last


@pytest.mark.filterwarnings("ignore:the fit has not converged")
def test_parts_that_cannot_be_written_stop_the_fit(alone, tmp_path, monkeypatch):
    def full(folder, group):
        if folder.name == "step-000000006":
            raise bmr.errors.PyroBMRError("no space")
        return {}

    monkeypatch.setattr(sharded_checkpoints, "written_parts", full)
    with pytest.raises(bmr.errors.PyroBMRError, match="no space"):
        group.fit(epochs=3, checkpoint=bmr.Checkpoints(tmp_path, every_steps=3, every_seconds=1e9))
    assert not (tmp_path / "step-000000009").exists()
