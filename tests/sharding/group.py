"""What tests/sharding/test_sharded_fit.py runs in WORLD_SIZE processes of one group: `python
tests/sharding/group.py FOLDER`.

Four of them do more than three, which the fast tests have.
"""

import os
import sys
from pathlib import Path

import filelock  # noqa: F401
import pandas as pd  # noqa: F401
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import pyro_bmr as bmr
from pyro_bmr.fitting.arguments import Arguments
from pyro_bmr.fitting.rows import rows_of
from pyro_bmr.sharding import layers, sharded_fit
from pyro_bmr.sharding.kth_value import kth_value, lowest
from pyro_bmr.sharding.layers import ShardedLayers
from pyro_bmr.sharding.layout import Layout
from pyro_bmr.sharding.sharded_run import ShardedRun
from tests.process_group import fork_group

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
X = torch.randn(101, 6, generator=torch.Generator().manual_seed(1)).double()
Y = (X @ torch.tensor([2.0, -1.0, 0.5, 0.0, 0.0, 0.0]).double() > 0).long()
PRIORS = {
    "0.weight": bmr.Gaussian("layer"),
    "0.bias": bmr.Gaussian(scale=0.4, mean=0.3),
    "*": bmr.Gaussian(),
}


def network(device="cpu"):
    """Ten and two rows do not divide by the processes, and the point estimates are whole."""
    torch.manual_seed(0)
    like = {"device": device, "dtype": torch.float64}
    first, last = nn.Linear(6, 10, **like), nn.Linear(10, 2, **like)
    return nn.Sequential(first, nn.LayerNorm(10, **like), nn.Tanh(), last)


def program(device="cpu"):
    return bmr.BayesianNetwork(network(device), PRIORS, bmr.Categorical())


def fit(**arguments):
    settings = {"epochs": 4, "batch_size": 26, "optimizer": bmr.natural_gradient(), "seed": 3}
    return sharded_fit(program(), (X, Y), progress=False, **{**settings, **arguments})


OPTIMIZERS = {"natural": bmr.natural_gradient(), "adam": bmr.adam(1e-2)}
KINDS = list(OPTIMIZERS)


class Branched(nn.Module):
    """Its layers run in another order than they are declared in; one of them in some steps, the
    same in all processes.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.last, self.first, self.extra = nn.Linear(7, 2), nn.Linear(6, 7), nn.Linear(7, 7)
        self.double().calls = 0

    def forward(self, x):
        h = self.first(x).tanh()
        self.calls += 1
        return self.last(self.extra(h).tanh() if self.calls % 5 > 2 else h)


def branched():
    """The elbo and the posterior of a fit of it, with layers gathered ahead, and without."""
    found, ahead = [], layers._overlap
    for layers._overlap in (ahead, lambda units: None):
        net = bmr.BayesianNetwork(Branched(), bmr.Gaussian(scale=0.5), bmr.Categorical())
        rest = {
            "epochs": 3,
            "batch_size": 26,
            "optimizer": bmr.adam(1e-2),
            "estimator": "antithetic",
        }
        done = sharded_fit(net, (X, Y), progress=False, **rest)
        found.append([*done.history["elbo"].tolist(), tensors(done.posterior.gathered())])
    layers._overlap = ahead
    return found


class Stopped(Exception):
    """A kill between two steps."""


def stopping(at):
    """The schedule of a fit that stops after the step `at`, if it is one."""

    def schedule(optimizer, steps):
        def rate(step):
            if step == at:
                raise Stopped
            return 1 - step / steps

        return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    return schedule


def saved(folder, at=-1, optimizer=None, seed=3):
    """A fit with reductions, saved in every third of its 24 steps."""
    return fit(
        epochs=6,
        seed=seed,
        optimizer=optimizer or bmr.natural_gradient(),
        reduce=bmr.Every(1, start=0, kept=0.5),
        scheduler=stopping(at),
        checkpoint=bmr.Checkpoints(folder, every_steps=3),
    )


def resumed(folder):
    """The same fit whole, and stopped after step 17 and continued. The first of the fits too."""
    found, fits = {}, []
    for kind in KINDS if PROCESSES == 4 else KINDS[:1]:
        optimizer = OPTIMIZERS[kind]
        fits.append(saved(folder / kind, -1, optimizer))
        found[kind] = tensors(fits[-1].posterior.gathered())
        try:
            saved(folder / f"{kind} stopped", 17, optimizer)
        except Stopped:
            found[f"{kind} files"] = sorted(
                path.name for path in (folder / f"{kind} stopped").glob("step*")
            )
        again = saved(folder / f"{kind} stopped", -1, optimizer)
        found[f"{kind} again"] = tensors(again.posterior.gathered())
    return found, fits[0]


def tensors(posterior):
    return {
        f"{key} {name}": getattr(site, key)
        for name, site in posterior.sites.items()
        for key in ("mean", "var", "kept")
    }


def one_step(estimator):
    """The draw, the noise and the gradients of step 5 in the first 10 rows, gathered."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    sharded = ShardedLayers(program(), mesh, 0)
    given = Arguments(
        sharded.network, bmr.MeanField, 1, 10, bmr.adam(), None, 3, 0.7, None, None, 0, True
    )
    run = ShardedRun(sharded, rows_of(given, (X, Y), None), given, estimator)
    step, parts = run.step, run.step.parts
    with torch.no_grad():
        step.log_scale.add_(torch.linspace(-1, 0, len(step.log_scale)).double())
    index = torch.arange(10).tensor_split(PROCESSES)[dist.get_rank()]
    draw = run.draw((X[index], Y[index]), len(index) / 10, 5)
    found = {"noise": draw.noise * draw.sign, "loc": step.loc.detach().clone()}
    found["log_scale"] = step.log_scale.detach().clone()
    step.write_gradients(draw)
    found |= {"loc.grad": step.loc.grad, "log_scale.grad": step.log_scale.grad}
    shapes = {s.name: s.shape for s in run.guide.latents}
    likelihood, total = (
        torch.tensor([draw.expected_log_likelihood * len(index) / 10], dtype=torch.float64),
        {},
    )
    dist.all_reduce(likelihood)
    for key, flat in found.items():
        for name, part in parts.items():
            own = flat.detach()[part].view(shapes[name])
            total[f"{key} {name}"] = run.layout.whole(name, own.clone())
    return total | {"kl": torch.tensor(draw.kl, dtype=torch.float64), "likelihood": likelihood}


def scores(rank):
    """Scores with ties, infinities and both zeros: those of this process, and all of them."""
    generator = torch.Generator().manual_seed(4)
    sites = {"a": torch.randn(13, 5, generator=generator), "b": torch.randn(3, generator=generator)}
    sites["a"] = (sites["a"] * 3).round() / 3 * sites["a"].new_tensor([1e-30, 1, 1, 1e30, -1])
    sites["a"][2], sites["a"][7, 1:3], sites["b"][0] = torch.inf, -torch.inf, torch.inf
    layout = Layout(init_device_mesh("cpu", (PROCESSES,)), {n: s.shape for n, s in sites.items()})
    return layout, {name: layout.own(s).clone() for name, s in sites.items()}, sites


def ranks_of(sites):
    """All ranks of the scores; of three processes every ninth, and the last."""
    every = sum(s.numel() for s in sites.values())
    return [*range(1, every, 1 if PROCESSES == 4 else 9), every]


def least(rank):
    layout, own, sites = scores(rank)
    flat = torch.cat([s.reshape(-1) for s in own.values()])
    ranks = ranks_of(sites)
    found = {"kth": [(k, kth_value(flat, k, layout).item()) for k in ranks]}
    found["kth double"] = [(k, kth_value(flat.double(), k, layout).item()) for k in ranks]
    for count in (0, 1, 7, 20, 33, ranks[-1]):
        chosen = lowest(own, count, layout)
        found[count] = {name: layout.whole(name, mask) for name, mask in chosen.items()}
    return found


def reductions(posterior):
    """What the parts say of reductions, gathered."""
    found = {}
    for key, arguments in REDUCTIONS.items():
        reduction = posterior.reduce(**arguments)
        whole = tensors(reduction.posterior.gathered())
        found[key] = {"gains": dict(reduction.gains), "kept": reduction.kept, "tensors": whole}
        assert all(torch.equal(whole[f"kept {n}"], m) for n, m in reduction.masks().items())
    return found


REDUCTIONS = {
    "evidence": {"to": bmr.Gaussian(scale=0)},
    "threshold": {"to": {"*.weight": bmr.Gaussian(scale=0)}, "threshold": 1.5},
    "kept": {"to": bmr.Gaussian(scale=0), "kept": 0.37},
    "narrow": {"to": bmr.Gaussian(scale=0.2)},
    "narrow kept": {"to": bmr.Gaussian(scale=0.2), "kept": 0.5},
}


def in_parts():
    """A fit whose batches run in three parts, of which the last has fewer rows than that."""
    whole, parts = (
        sharded_fit(
            program(), (X[:82], Y[:82]), epochs=3, batch_size=26, micro_batches=count, seed=1,
            optimizer=bmr.adam(1e-2), progress=False,
        )
        for count in (1, 3)
    )  # fmt: skip
    return [[f.history["elbo"].tolist(), tensors(f.posterior.gathered())] for f in (whole, parts)]


def law(make, seeds):
    """Optimiser → what fits with these seeds have found, a row each: the bound, and moments."""
    found = {}
    for kind, optimizer in OPTIMIZERS.items():
        rows = []
        for seed in seeds:
            rest = {"epochs": 3, "batch_size": 26, "optimizer": optimizer, "seed": seed}
            done = make(program(), (X, Y), progress=False, **rest)
            posterior = getattr(done.posterior, "gathered", lambda done=done: done.posterior)()
            first, last = posterior["0.weight"], posterior["3.weight"]
            moments = (first.mean[0, 0], last.mean[1, 3], first.mean.square().mean())
            moments += (first.var.log().mean(), last.var[0, 2].log(), first.var[9, 5].log())
            rows.append([*map(float, (done.history["elbo"].iloc[-1], *moments))])
        found[kind] = rows
    return found


def copies():
    """A fit on a mesh of two copies in two parts."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    found = fit(mesh=mesh, estimator="antithetic", temperature=0.5)
    return {"copies": tensors(found.posterior.gathered()), "copies scales": found.scales}


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    before = {name: p.clone() for name, p in network().named_parameters()}
    own = program()
    first, second = fit(), fit()
    again, pruned = resumed(folder)
    torch.save(
        {
            "first": tensors(first.posterior.gathered()),
            "second": tensors(second.posterior.gathered()),
            "history": [f.history.to_dict("list") for f in (first, second)],
            "scales": [f.scales for f in (first, pruned)],
            "reductions": reductions(first.posterior),
            "pruned": tensors(pruned.posterior.gathered()),
            "pruned history": pruned.history.to_dict("list"),
            "again": reductions(pruned.posterior),
            "shapes": {n: tuple(s.mean.shape) for n, s in first.posterior.own.sites.items()},
            "weight": one_step("weight"),
            "antithetic": one_step("antithetic"),
            "least": least(rank),
            "branched": branched(),
            "in parts": in_parts(),
            "resumed": again,
            "untouched": all(torch.equal(p, before[n]) for n, p in own.net.named_parameters()),
            **(copies() | {"law": law(sharded_fit, range(30))} if PROCESSES == 4 else {}),
        },
        folder / f"{rank}.pt",
    )
    first.posterior.gathered().save(folder / f"{rank}.safetensors")
    pruned.posterior.gathered().save(folder / f"pruned-{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    fork_group(main, Path(sys.argv[1]))
