"""What the public functions and commands do with odd or wrong input: a table of what they accept,
and a table of what they refuse by name and before any work.

Files that are not what their name says are in `test_data.py`, `test_runs.py` and `test_fuzz.py`,
the command line's options in `test_commands.py`, formats and small networks in `test_deployment.py`
and `test_shrinking.py`.
"""

import json
import math
import subprocess
import tarfile
import warnings
import zipfile
from functools import partial

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.cli.commands import main
from pyro_bmr.experiments.runs import save_run
from tests.data.test_data import arrays, idx_folder
from tests.fitting.test_fit import blobs, classifier

X, Y = blobs()
NAN = math.nan
fit = partial(bmr.fit, epochs=2, batch_size=32, progress=False)


def lifted(net, prior=None, seed=0):
    torch.manual_seed(seed)
    return bmr.BayesianNetwork(net(), prior or bmr.Gaussian(0.5), bmr.Categorical())


def plain():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    net[2].weight = net[0].weight
    return net


def frozen():
    return plain().requires_grad_(False)


def quantised():
    with warnings.catch_warnings():
        # torch has another way to quantise, in a package of its own
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}, dtype=torch.qint8)


class Head(nn.Module):
    """A linear layer and one odd parameter that its output is multiplied by, or not."""

    def __init__(self, extra, used=True, name="extra"):
        super().__init__()
        self.layer, self.name, self.used = nn.Linear(4, 3), name, used
        self.register_parameter(name, extra)

    def forward(self, x):
        return self.layer(x) * getattr(self, self.name) if self.used else self.layer(x)


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3).t())

    def forward(self, x):
        return x @ self.w.t()


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("ü ñ/x*[0]", nn.Linear(4, 3))

    def forward(self, x):
        return next(self.children())(x)


TAKEN = {
    "non-contiguous x": lambda: fit(classifier(), (X.t().contiguous().t(), Y)),
    "expanded x": lambda: fit(classifier(), (X[:1].expand(90, 4), Y)),
    "features without variance": lambda: fit(classifier(), (torch.zeros(90, 4), Y)),
    "one class": lambda: fit(classifier(), (X, torch.zeros(90, dtype=torch.long))),
    "one row": lambda: fit(classifier(), (X[:1], Y[:1])),
    "x of another dtype": lambda: fit(classifier(), (X.double(), Y)),
    "x that requires grad": lambda: fit(classifier(), (X.clone().requires_grad_(), Y)),
    "labels of 32 bits": lambda: fit(classifier(), (X, Y.int())),
    "labels of 8 bits": lambda: fit(classifier(), (X, Y.to(torch.uint8))),
    "labels as floats": lambda: fit(classifier(), (X, Y.float())),
    "labels as bools": lambda: fit(classifier(), (X, Y > 0)),
    "a list of x and y": lambda: fit(classifier(), [X, Y]),
    "tied parameters": lambda: fit(lifted(tied), (X, Y)),
    "an integer parameter": lambda: fit(
        lifted(lambda: Head(nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False))),
        (X, Y),
    ),
    "a parameter that is frozen": lambda: fit(
        lifted(lambda: Head(nn.Parameter(torch.ones(3), requires_grad=False))), (X, Y)
    ),
    "a 0-d parameter": lambda: fit(lifted(lambda: Head(nn.Parameter(torch.tensor(1.0)))), (X, Y)),
    "a parameter without entries": lambda: fit(
        lifted(lambda: Head(nn.Parameter(torch.zeros(0, 5)), used=False)), (X, Y)
    ),
    "a non-contiguous parameter": lambda: fit(lifted(Transposed), (X, Y)),
    "odd names": lambda: fit(lifted(Named), (X, Y)),
    "a negative seed": lambda: fit(classifier(), (X, Y), seed=-3),
}


@pytest.mark.filterwarnings("ignore:ΔF.*parameters > rows")
@pytest.mark.parametrize("case", TAKEN)
def test_odd_input_is_fitted_reduced_predicted_saved_and_exported(case, tmp_path):
    done = TAKEN[case]()
    assert all(
        bool(s.mean.isfinite().all() and s.var.isfinite().all())
        for s in done.posterior.sites.values()
    )
    reduction = bmr.reduce(done.posterior, to=bmr.Gaussian(0.0))
    assert bool(bmr.predict(done.program, reduction.posterior, X).probs.isfinite().all())
    path = tmp_path / "a folder with ü and spaces" / "posterior.safetensors"
    path.parent.mkdir()
    reduction.posterior.save(path)
    loaded = bmr.Posterior.load(path)
    assert all(
        torch.equal(loaded[name].mean, site.mean)
        for name, site in reduction.posterior.sites.items()
    )
    bmr.save(bmr.export(done.program, loaded), path.parent)
    resumed = (
        done.seed,
        fit(done.program, (X, Y), checkpoint=path.parent / "checkpoints").history["step"].iloc[-1],
    )
    assert resumed[1] == 6


def moments(mean, var):
    return bmr.Posterior.from_moments({"w": mean}, {"w": var}, bmr.Gaussian(0.5))


def unit(d):
    return bmr.formulas.Diagonal(torch.zeros(d), torch.ones(d))


def dense(d, scale=1.0):
    return bmr.formulas.Dense(torch.ones(d), scale * torch.eye(d))


@pytest.fixture(scope="module")
def done():
    return fit(classifier(), (X, Y))


ones = torch.ones(3)
BAD_FITS = {
    "x of text": (
        lambda: fit(classifier(), (X.numpy().astype(str), Y)),
        bmr.errors.DataError,
        "x: expected a tensor, got ndarray; make numbers of the texts",
    ),
    "x of lists": (
        lambda: fit(classifier(), (X.tolist(), Y)),
        bmr.errors.DataError,
        "x: expected a tensor, got list; .*torch.tensor",
    ),
    "no y": (lambda: fit(classifier(), X), bmr.errors.DataError, r"a pair \(x, y\).*got Tensor"),
    "three of them": (
        lambda: fit(classifier(), (X, Y, Y)),
        bmr.errors.DataError,
        r"a pair \(x, y\).*got tuple",
    ),
    "0-d x": (
        lambda: fit(classifier(), (torch.tensor(1.0), Y)),
        bmr.errors.DataError,
        r"got x of shape \(\)",
    ),
    "x of integers": (
        lambda: fit(classifier(), (X.long(), Y)),
        bmr.errors.FitError,
        r"does not run as program\(x, y\) on x of shape \(8, 4\) and torch.int64",
    ),
    "x of bools": (lambda: fit(classifier(), (X > 0, Y)), bmr.errors.FitError, "torch.bool"),
    "complex x": (
        lambda: fit(classifier(), (X + 1j, Y)),
        bmr.errors.DataError,
        "x: expected real numbers, got torch.complex64",
    ),
    "sparse x": (
        lambda: fit(classifier(), (X.to_sparse(), Y)),
        bmr.errors.DataError,
        "x: expected a dense tensor with values, got .*sparse_coo",
    ),
    "x on no device": (
        lambda: fit(classifier(), (X.to("meta"), Y)),
        bmr.errors.DataError,
        "on 'meta'",
    ),
    "x too narrow": (
        lambda: fit(classifier(), (X[:, :3], Y)),
        bmr.errors.FitError,
        r"x of shape \(8, 3\).*cannot be multiplied",
    ),
    "y between classes": (
        lambda: fit(classifier(), (X, Y + 0.5)),
        bmr.errors.DataError,
        r"outside the support.*got 0\.5 in row 0",
    ),
    "y in a column": (
        lambda: fit(classifier(), (X, Y[:, None])),
        bmr.errors.DataError,
        r"y: expected shape \(8,\), .*got shape \(8, 1\)",
    ),
    "validation too narrow": (
        lambda: fit(classifier(), (X, Y), validation=(X[:, :2], Y)),
        bmr.errors.FitError,
        r"x of shape \(8, 2\)",
    ),
    "validation out of range": (
        lambda: fit(classifier(), (X, Y), validation=(X, Y + 5)),
        bmr.errors.DataError,
        "got 5 in row 0",
    ),
    "validation NaN": (
        lambda: fit(classifier(), (X, Y), validation=NAN),
        bmr.errors.FitError,
        "validation=nan",
    ),
    "epochs of 1.5": (
        lambda: fit(classifier(), (X, Y), epochs=1.5),
        bmr.errors.FitError,
        r"epochs=1\.5: expected a whole number",
    ),
    "skip -1": (
        lambda: fit(classifier(), (X, Y), skip_faulty=-1),
        bmr.errors.FitError,
        r"skip_faulty=-1: expected a number of steps >= 0",
    ),
    "skip all": (
        lambda: fit(classifier(), (X, Y), skip_faulty=True),
        bmr.errors.FitError,
        r"skip_faulty=True: expected a whole number",
    ),
    "batch of 2.5": (
        lambda: fit(classifier(), (X, Y), batch_size=2.5),
        bmr.errors.FitError,
        r"batch_size=2\.5: expected a whole number",
    ),
    "seed of 1.5": (
        lambda: fit(classifier(), (X, Y), seed=1.5),
        bmr.errors.FitError,
        r"seed=1\.5: expected a whole number",
    ),
    "a seed too large": (
        lambda: fit(classifier(), (X, Y), seed=2**63),
        bmr.errors.FitError,
        "seed=9223372036854775808",
    ),
    "no program": (
        lambda: fit(None, (X, Y)),
        bmr.errors.FitError,
        "program: expected a Pyro program.*BayesianNetwork",
    ),
    "a plain network": (
        lambda: fit(plain(), (X, Y)),
        bmr.errors.FitError,
        "positional arguments.*BayesianNetwork",
    ),
    "a guide by name": (
        lambda: fit(classifier(), (X, Y), guide="MeanField"),
        bmr.errors.FitError,
        "guide: expected MeanField, .*, got 'MeanField'",
    ),
    "an optimiser by name": (
        lambda: fit(classifier(), (X, Y), optimizer="adam"),
        bmr.errors.FitError,
        r"optimizer: .*adam\(1e-3\).*got 'adam'",
    ),
    "a made optimiser": (
        lambda: fit(
            classifier(), (X, Y), optimizer=torch.optim.SGD([ones.clone().requires_grad_()], 0.1)
        ),
        bmr.errors.FitError,
        "optimizer: expected a function",
    ),
    "an optimiser with a closure": (
        lambda: fit(classifier(), (X, Y), optimizer=torch.optim.LBFGS),
        bmr.errors.FitError,
        "got LBFGS",
    ),
    "a NaN rate": (
        lambda: fit(classifier(), (X, Y), optimizer=bmr.adam(NAN)),
        bmr.errors.FitError,
        "optimizer: it cannot be made.*nan",
    ),
    "a schedule by name": (
        lambda: fit(classifier(), (X, Y), scheduler="cosine"),
        bmr.errors.FitError,
        "scheduler: .*got 'cosine'",
    ),
    "reductions by name": (
        lambda: fit(classifier(), (X, Y), reduce="every"),
        bmr.errors.FitError,
        r"reduce: expected Every\(\.\.\.\)",
    ),
    "start by name": (
        lambda: fit(classifier(), (X, Y), start="here"),
        bmr.errors.FitError,
        r"start: expected Posterior\(\.\.\.\)",
    ),
    "start elsewhere": (
        lambda: fit(classifier(), (X, Y), start=moments(ones, ones)),
        bmr.errors.FitError,
        r"start: its sites \(w\)",
    ),
    "a checkpoint number": (
        lambda: fit(classifier(), (X, Y), checkpoint=3),
        bmr.errors.FitError,
        "checkpoint: expected a folder or Checkpoints",
    ),
    "a NaN weight": (
        lambda: fit(lifted(lambda: Head(nn.Parameter(torch.tensor(NAN)))), (X, Y)),
        bmr.errors.FitError,
        "step 1: .*not finite at extra",
    ),
    "all frozen": (
        lambda: lifted(frozen),
        bmr.errors.ModelError,
        "no parameter of Sequential is lifted.*frozen",
    ),
    "quantised": (
        lambda: lifted(quantised),
        bmr.errors.ModelError,
        "no parameter of Sequential is lifted",
    ),
    "no network": (
        lambda: bmr.BayesianNetwork(None, bmr.Gaussian(), bmr.Categorical()),
        bmr.errors.ModelError,
        "net=None",
    ),
    "no likelihood": (
        lambda: bmr.BayesianNetwork(plain(), bmr.Gaussian(), None),
        bmr.errors.ModelError,
        r"likelihood=None\): expected Categorical\(\)",
    ),
    "a class of likelihoods": (
        lambda: bmr.BayesianNetwork(plain(), bmr.Gaussian(), bmr.Normal),
        bmr.errors.ModelError,
        r"likelihood=the class Normal\): expected ",
    ),
    "a NaN prior mean": (
        lambda: bmr.Gaussian(1.0, mean=torch.tensor([0.0, NAN])),
        bmr.errors.ModelError,
        "mean=.*expected finite numbers",
    ),
    "a prior mean of another shape": (
        lambda: fit(lifted(plain, bmr.Gaussian(1.0, mean=torch.ones(7))), (X, Y)),
        bmr.errors.ModelError,
        r"prior mean that broadcasts .*got shape \(7,\)",
    ),
    "a NaN threshold": (lambda: bmr.Every(threshold=NAN), bmr.errors.FitError, "threshold=nan"),
    "compare without data": (
        lambda: bmr.compare("mlp", None),
        bmr.errors.DataError,
        "data as load",
    ),
    "load nothing": (lambda: bmr.load(None), bmr.errors.DataError, "the name of a data set"),
    "load a zero byte": (lambda: bmr.load("a\0b.npz"), bmr.errors.DataError, "no data set or file"),
}


@pytest.mark.parametrize("case", BAD_FITS)
def test_bad_fits_are_refused(case):
    call, error, words = BAD_FITS[case]
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    "change",
    [
        {"to": "gaussian"},
        {"to": bmr.Gaussian},
        {"per": "galaxy"},
        {"per": "head"},
        {"to": {"nowhere": bmr.Gaussian(0.0)}},
    ],
)
def test_reductions_that_cannot_be_made_are_refused_before_the_first_step(change, monkeypatch):
    monkeypatch.setattr("pyro_bmr.fitting.loop.take_step", None)
    with pytest.raises(bmr.errors.ReductionError):
        fit(classifier(), (X, Y), epochs=10, reduce=bmr.Every(**change))


rand = torch.rand(5, 3)
zeros = torch.zeros(5, dtype=torch.long)
BAD_CALLS = {
    "predict NaN": (
        lambda d: bmr.predict(d.program, d.posterior, X.index_fill(0, torch.tensor([7]), NAN)),
        bmr.errors.DataError,
        "x is NaN or infinite, first in row 7",
    ),
    "predict no rows": (
        lambda d: bmr.predict(d.program, d.posterior, X[:0]),
        bmr.errors.DataError,
        "at least one",
    ),
    "predict 0-d": (
        lambda d: bmr.predict(d.program, d.posterior, torch.tensor(1.0)),
        bmr.errors.DataError,
        r"shape \(\)",
    ),
    "predict text": (
        lambda d: bmr.predict(d.program, d.posterior, X.numpy().astype(str)),
        bmr.errors.DataError,
        "got ndarray",
    ),
    "predict too narrow": (
        lambda d: bmr.predict(d.program, d.posterior, X[:, :2]),
        bmr.errors.ModelError,
        r"does not run on x of shape \(90, 2\)",
    ),
    "predict 1.5 draws": (
        lambda d: bmr.predict(d.program, d.posterior, X, draws=1.5),
        bmr.errors.ModelError,
        r"draws=1\.5",
    ),
    "predict from another posterior": (
        lambda d: bmr.predict(d.program, moments(ones, ones), X),
        bmr.errors.ModelError,
        "one observed site",
    ),
    "score a label out of range": (
        lambda d: bmr.predict(d.program, d.posterior, X).log_prob(Y + 1),
        bmr.errors.DataError,
        "label 3 in row 2 .* 0 to 2",
    ),
    "score a negative label": (
        lambda d: bmr.predict(d.program, d.posterior, X).log_prob(Y - 1),
        bmr.errors.DataError,
        "label -1 in row 0",
    ),
    "score fewer rows": (
        lambda d: bmr.predict(d.program, d.posterior, X).log_prob(Y[:5]),
        bmr.errors.DataError,
        r"\(90, 3\) and y of shape \(5,\)",
    ),
    "reduce nothing": (
        lambda d: bmr.reduce(None, to=bmr.Gaussian(0.0)),
        bmr.errors.ReductionError,
        "expected a Posterior",
    ),
    "reduce to a class": (
        lambda d: bmr.reduce(d.posterior, to=bmr.Gaussian),
        bmr.errors.ReductionError,
        r"call it, as in Gaussian\(scale=0\)",
    ),
    "reduce to a word": (
        lambda d: bmr.reduce(d.posterior, to="gaussian"),
        bmr.errors.ReductionError,
        "with log_prob, got 'gaussian'",
    ),
    "a NaN threshold": (
        lambda d: bmr.reduce(d.posterior, to=bmr.Gaussian(0.0), threshold=NAN),
        bmr.errors.ReductionError,
        "threshold: expected a number of nats, got nan",
    ),
    "a NaN target": (
        lambda d: bmr.reduce(d.posterior, to=bmr.Gaussian(0.0), kept=NAN),
        bmr.errors.ReductionError,
        "kept: expected a fraction between 0 and 1, got nan",
    ),
    "refit nothing": (
        lambda d: bmr.refit(d, None, (X, Y)),
        bmr.errors.FitError,
        "expected a Reduction.*got NoneType",
    ),
    "moments of numpy": (
        lambda d: moments(np.ones(3), ones),
        bmr.errors.ModelError,
        "site 'w': expected a tensor of .* as mean, got ndarray",
    ),
    "moments of integers": (
        lambda d: moments(ones.long(), ones),
        bmr.errors.ModelError,
        "site 'w': expected a tensor of .* as mean, got torch.int64",
    ),
    "no moments": (
        lambda d: bmr.Posterior.from_moments({}, {}, bmr.Gaussian(0.5)),
        bmr.errors.ModelError,
        "mean: expected site name → tensor, got none",
    ),
    "moments that are NaN": (
        lambda d: moments(ones * NAN, ones),
        bmr.errors.ModelError,
        "finite means",
    ),
    "a negative variance": (
        lambda d: moments(ones, -ones),
        bmr.errors.ModelError,
        "variances >= 0",
    ),
    "a 0-d sample": (
        lambda d: bmr.Posterior.from_samples({"w": torch.tensor(1.0)}, bmr.Gaussian(0.5)),
        bmr.errors.ModelError,
        "at least two",
    ),
    "samples of integers": (
        lambda d: bmr.Posterior.from_samples({"w": torch.ones(5, 3).long()}, bmr.Gaussian(0.5)),
        bmr.errors.ModelError,
        "expected a tensor of floating-point numbers as samples",
    ),
    "samples that are NaN": (
        lambda d: bmr.Posterior.from_samples({"w": torch.full((5, 3), NAN)}, bmr.Gaussian(0.5)),
        bmr.errors.ModelError,
        "finite means",
    ),
    "a negative sample of a scale": (
        lambda d: bmr.Posterior.from_samples(
            {"w": -torch.rand(9, 3)}, bmr.Gaussian(0.5), supports={"w": "positive"}
        ),
        bmr.errors.ModelError,
        "finite means",
    ),
    "ΔF of nothing": (
        lambda d: bmr.delta_f(None, unit(3), unit(3)),
        bmr.errors.ReductionError,
        "expected a Gaussian, with mean and var, got None",
    ),
    "ΔF of a dense posterior of another size": (
        lambda d: bmr.delta_f(dense(3), dense(2), dense(3)),
        bmr.errors.ReductionError,
        r"\(d,\) and \(d, d\) with one d",
    ),
    "a reduced dense posterior of another size": (
        lambda d: bmr.formulas.reduced_posterior(dense(3), dense(3), dense(2)),
        bmr.errors.ReductionError,
        "with one d",
    ),
    "ΔF of a posterior not positive definite": (
        lambda d: bmr.delta_f(dense(2, -1.0), dense(2), dense(2)),
        bmr.errors.ReductionError,
        "not positive definite",
    ),
    "a subset of another size": (
        lambda d: bmr.formulas.prune_subset(dense(2), unit(2), ones > 0),
        bmr.errors.ReductionError,
        r"bool tensor of shape \(2,\).*\(3,\)",
    ),
    "a subset of floats": (
        lambda d: bmr.formulas.prune_subset(dense(3), unit(3), ones),
        bmr.errors.ReductionError,
        r"got a float32 tensor",
    ),
    "no draws": (
        lambda d: bmr.formulas.monte_carlo_delta_f(torch.ones(0, 3), unit(3), unit(3)),
        bmr.errors.ReductionError,
        "as many draws",
    ),
    "draws that are NaN": (
        lambda d: bmr.formulas.monte_carlo_delta_f(torch.full((9, 3), NAN), unit(3), unit(3)),
        bmr.errors.ReductionError,
        "9 NaN",
    ),
    "inclusion of NaN": (
        lambda d: bmr.formulas.exact_inclusion(torch.tensor([NAN, 1.0])),
        bmr.errors.ReductionError,
        "got 1 NaN",
    ),
    "inclusion with a negative α": (
        lambda d: bmr.formulas.exact_inclusion(ones, alpha=-1.0),
        bmr.errors.ReductionError,
        r"finite alpha and beta > 0, got -1\.0",
    ),
    "best variance of NaN": (
        lambda d: bmr.formulas.best_var(bmr.formulas.Message(ones * NAN, ones), ones),
        bmr.errors.ReductionError,
        "expected a message of finite numbers",
    ),
    "families that differ": (
        lambda d: bmr.formulas.natural_delta_f(
            dist.Normal(0.0, 1.0), dist.Gamma(1.0, 1.0), dist.Normal(0.0, 1.0)
        ),
        bmr.errors.ReductionError,
        "one exponential family",
    ),
    "save nothing": (
        lambda d: bmr.save(None, "here"),
        bmr.errors.ModelError,
        "a network or a mapping.*NoneType",
    ),
    "export nothing": (
        lambda d: bmr.export(None, d.posterior),
        bmr.errors.ModelError,
        "got NoneType",
    ),
    "accuracy of other rows": (
        lambda d: bmr.metrics.accuracy(rand, zeros[:4]),
        bmr.errors.DataError,
        r"\(5, 3\) and y of shape \(4,\)",
    ),
    "accuracy of a column": (
        lambda d: bmr.metrics.accuracy(rand, zeros[:, None]),
        bmr.errors.DataError,
        r"y of shape \(5, 1\)",
    ),
    "accuracy of nothing": (
        lambda d: bmr.metrics.accuracy(rand[:0], zeros[:0]),
        bmr.errors.DataError,
        "at least one row",
    ),
    "accuracy of NaN": (
        lambda d: bmr.metrics.accuracy(rand * NAN, zeros),
        bmr.errors.DataError,
        "probs is NaN, first in row 0",
    ),
    "a Brier score out of range": (
        lambda d: bmr.metrics.brier(rand, zeros + 7),
        bmr.errors.DataError,
        "label 7 in row 0",
    ),
    "a calibration error without bins": (
        lambda d: bmr.metrics.ece(rand, zeros, bins=0),
        bmr.errors.DataError,
        "bins=0",
    ),
    "RMSE of a column": (
        lambda d: bmr.metrics.rmse(torch.zeros(5), torch.zeros(5, 1)),
        bmr.errors.DataError,
        r"\(5,\) and y of shape \(5, 1\)",
    ),
    "RMSE of NaN": (
        lambda d: bmr.metrics.rmse(torch.full((5,), NAN), torch.zeros(5)),
        bmr.errors.DataError,
        "expected mean and y of one shape, finite.*, mean not finite",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused(case, done):
    call, error, words = BAD_CALLS[case]
    with pytest.raises(error, match=words):
        call(done)


WRITERS = {
    "posterior": lambda d, folder: [
        d.posterior.save(folder / f"posterior-{k}.safetensors") for k in range(5)
    ],
    "save": lambda d, folder: bmr.save(d.program.net, folder / "net"),
    "deploy": lambda d, folder: bmr.deploy(
        d.program.net, folder / "deployed", X, formats=["safetensors"], seconds=0
    ),
    "reduction": (
        lambda d, folder: bmr.reduce(d.posterior, to=bmr.Gaussian(0.0)).save(folder / "reduction")
    ),
    "run": lambda d, folder: save_run(d, folder / "run", {"model": "mlp"}),
    "checkpoint": lambda d, folder: fit(classifier(), (X, Y), checkpoint=folder / "checkpoints"),
    "compare": lambda d, folder: bmr.compare(
        "mlp:4",
        bmr.load("digits"),
        priors={"g": bmr.Gaussian()},
        routes=["map"],
        seeds=1,
        settings=bmr.Settings(epochs=1),
        out=folder / "c",
        progress=False,
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("place", ["read-only", "below a file"])
def test_folders_that_cannot_be_written(writer, place, done, tmp_path, blank):
    (tmp_path / "file").write_text("")
    folder = {"read-only": tmp_path.__class__("/proc/self"), "below a file": tmp_path / "file"}[
        place
    ]
    with pytest.raises(bmr.PyroBMRError, match=r"cannot write (to )?'"):
        WRITERS[writer](done, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 32 kB with 4 kB left."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "none", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.strip()}")
    try:
        (folder / "filler").write_bytes(bytes(28 * 1024))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_said_and_leaves_nothing_half_written(writer, done, full_disk, blank):
    with pytest.raises(bmr.PyroBMRError, match="[Nn]o space left"):
        WRITERS[writer](done, full_disk)
    assert not [
        p.name
        for p in full_disk.rglob("*")
        if p.is_file() and (p.name.startswith(".") or p.name.endswith(".tmp"))
    ]


@pytest.fixture
def blank(monkeypatch):
    """No pictures: they take most of the time of a comparison."""
    monkeypatch.setattr(
        "pyro_bmr.experiments.plots.save_figure", lambda figure, path: path.write_bytes(b"")
    )


def test_names_in_an_archive_lead_nowhere(tmp_path):
    path = tmp_path / "deep" / "er" / "mine.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, **arrays(), **{"../../out": np.ones(3), "/tmp/out": np.ones(3)})
    with zipfile.ZipFile(path) as file:
        assert {"../../out.npy", "/tmp/out.npy"} <= set(file.namelist())
    before = sorted(tmp_path.rglob("*"))
    assert len(bmr.load(path).x_train) == 30
    assert sorted(tmp_path.rglob("*")) == before
    only = tmp_path / "only.npz"
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(only, "w") as out:
        for name in file.namelist():
            out.writestr(f"../{name}", file.read(name))
    with pytest.raises(bmr.errors.DataError, match="it has no x_train"):
        bmr.load(only)


def test_an_archive_in_the_place_of_a_folder(tmp_path):
    idx_folder(tmp_path / "idx")
    with tarfile.open(tmp_path / "idx.npz", "w") as file:
        file.add(tmp_path / "idx")
    with pytest.raises(bmr.errors.DataError, match=r"not a readable \.npz"):
        bmr.load(tmp_path / "idx.npz")


def test_links_and_pipes_in_the_place_of_files(tmp_path):
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    with pytest.raises(bmr.errors.DataError, match="no data set or file"):
        bmr.load(tmp_path / "loop.csv", "a")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(bmr.errors.DataError, match="no file train-images"):
        bmr.load(tmp_path / "folder.npz")


def test_the_command_line_with_odd_paths(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "ein Ordner, ü und 'so'"
    folder.mkdir()
    monkeypatch.chdir(folder)
    pd.DataFrame(
        {"größe x": np.arange(40) % 7 / 3, "b": np.arange(40) % 5, "ziel y": np.arange(40) % 2}
    ).to_csv("daten ü.csv", index=False)
    small = ["--epochs", "1", "--draws", "2", "--quiet"]
    assert (
        main(
            [
                "fit",
                "--data",
                "daten ü.csv",
                "--target",
                "ziel y",
                "--model",
                "mlp:4",
                *small,
                "--out",
                "lauf 1",
            ]
        )
        == 0
    )
    assert main(["reduce", "lauf 1", "--draws", "2"]) == 0
    assert main(["export", "lauf 1", "--seconds", "0", "--out", "aus ü"]) == 0
    assert (
        json.loads((folder / "aus ü" / "report.json").read_text())["settings"]["target"] == "ziel y"
    )
    capsys.readouterr()
    for argv in (
        ["fit", *small, "--out", "/proc/self/run"],
        ["export", "lauf 1", "--out", "daten ü.csv"],
        ["reduce", "daten ü.csv"],
    ):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and err.startswith("pyro-bmr: ") and out == ""
