"""What tests/fitting/test_processes.py runs in two processes of one group: `python
tests/fitting/two_processes.py CASE FOLDER`.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

import pyro_bmr as bmr
from pyro_bmr.fitting.processes import Processes
from tests.process_group import fork_group

X = torch.randn(101, 6, generator=torch.Generator().manual_seed(1))
Y = (X @ torch.tensor([2.0, -1.0, 0.5, 0.0, 0.0, 0.0]) > 0).long()


def model(seed=0):
    torch.manual_seed(seed)
    return bmr.BayesianNetwork(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)),
        bmr.Gaussian(scale=0.7),
        bmr.Categorical(),
    )


def point(seed=0):
    """Without noise, with batches that do not divide by two: what two processes find is what one
    finds.
    """
    return bmr.fit(
        model(seed),
        (X, Y),
        guide=bmr.Point,
        epochs=6,
        batch_size=25,
        optimizer=bmr.adam(1e-2),
        progress=False,
    )


def collated(rows):
    """Batches that only the loader can make."""
    return default_collate(rows)


def loaded(generator=None):
    """Batches of a loader, of which each process takes its part."""
    data = TensorDataset(X[:100], Y[:100])
    loader = DataLoader(data, 25, shuffle=True, generator=generator, collate_fn=collated)
    return bmr.fit(
        model(), loader, guide=bmr.Point, epochs=3, optimizer=bmr.adam(1e-2), progress=False
    )


def natural():
    """Gradients of different noise in each, reductions, an empirical scale, and weights that start
    differently in each.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(rank)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    program = bmr.BayesianNetwork(net, bmr.Gaussian(), bmr.Categorical())
    return bmr.fit(
        program,
        (X, Y),
        epochs=20,
        batch_size=25,
        optimizer=bmr.natural_gradient(),
        reduce=bmr.Every(2),
        progress=False,
    )


class NotANumber(nn.Module):
    """Gives NaN in the process `rank` from call `since` on."""

    def __init__(self, rank, since):
        super().__init__()
        self.rank, self.since, self.calls = rank, since, 0

    def forward(self, x):
        self.calls += self.training
        return x * (
            float("nan") if self.calls >= self.since and dist.get_rank() == self.rank else 1.0
        )


def faulty(skip=0):
    net = nn.Sequential(nn.Linear(6, 8), NotANumber(1, 10), nn.Linear(8, 2))
    return bmr.fit(
        bmr.BayesianNetwork(net, bmr.Gaussian(scale=1.0), bmr.Categorical()),
        (X, Y),
        epochs=6,
        batch_size=25,
        progress=False,
        skip_faulty=skip,
    )


class Quits(nn.Module):
    """Ends the process `rank` at call `at`, as a kill would."""

    def __init__(self, rank, at):
        super().__init__()
        self.rank, self.at, self.calls = rank, at, 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == self.at and dist.get_rank() == self.rank:
            os._exit(9)
        return x


def killed(folder, at):
    torch.manual_seed(3)
    program = bmr.BayesianNetwork(
        nn.Sequential(nn.Linear(6, 8), Quits(1, at), nn.Linear(8, 2)),
        bmr.Gaussian(),
        bmr.Categorical(),
    )
    return bmr.fit(
        program,
        (X, Y),
        epochs=8,
        batch_size=25,
        progress=False,
        reduce=bmr.Every(1),
        checkpoint=bmr.Checkpoints(folder, every_steps=4),
    )


def saved_while_running(folder):
    """A fixed scale and epochs without a reduction, in which the checkpoints of the first process
    alone read the posterior.
    """
    rule = bmr.Checkpoints(folder, every_steps=3)
    return bmr.fit(
        model(),
        (X, Y),
        epochs=12,
        batch_size=25,
        progress=False,
        reduce=bmr.Every(4, kept=0.5),
        checkpoint=rule,
    )


def curved(kind="empirical", rows=101, shuffled=False, generator=None):
    """The curvature of a network with a norm layer, in batches that do not divide by two; diagonals
    as well. `shuffled`: from a loader in an order of its own, which `generator` draws.
    """
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    data, options = (X[:rows], Y[:rows]), {"fisher": kind, "batch_size": 25, "progress": False}
    if shuffled:
        data = DataLoader(
            TensorDataset(*data), 25, shuffle=True, generator=generator, collate_fn=collated
        )
    found = bmr.curvature(net, data, bmr.Categorical(), size=303, **options)
    layers = {
        f"{n} {k}": getattr(f, k) for n, f in found.layers.items() for k in ("inputs", "outputs")
    }
    return {**layers, **found.diagonals}


class Grown(Dataset):
    """Rows whose second batch differs between the processes."""

    def __len__(self):
        return 50

    def __getitem__(self, row):
        return X[row] + (dist.get_rank() if row >= 25 else 0), Y[row]


def pruned(folder=None, stop=False, fisher="gauss-newton", rows=101):
    """A network pruned in three rounds, in batches that do not divide by two. `stop`: after the
    first round.
    """
    torch.manual_seed(6)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2))

    def after(kept, net):
        if stop:
            raise KeyboardInterrupt

    try:
        found = bmr.prune(
            net.double(), (X[:rows].double(), Y[:rows]), bmr.Categorical(), 0.3, path=[0.7, 0.5],
            fisher=fisher, batch_size=25, rows=90, validation=(X.double(), Y),
            checkpoint=folder, after_round=after, corrections=6, last_corrections=12,
            progress=False,
        )  # fmt: skip
    except KeyboardInterrupt:
        return {}
    rounds = {f"{k} {n}": torch.tensor(v) for k, r in enumerate(found.rounds) for n, v in r.items()}
    spread = {f"row_cov {name}": layer.row_cov for name, layer in found.layers.items()}
    masks = {f"mask {name}": mask for name, mask in found.masks.items()}
    return {**found.net.state_dict(), **rounds, **spread, **masks}


def curved_rows(data):
    return bmr.curvature(nn.Linear(6, 2), data, bmr.Categorical(), batch_size=25, progress=False)


def message(run, *arguments):
    try:
        run(*arguments)
    except bmr.errors.PyroBMRError as error:
        return str(error)
    return "no error"


def tensors(fit):
    of_program = {f"program {name}": t for name, t in fit.program.state_dict().items()}
    return {
        **{f"mean {n}": s.mean for n, s in fit.posterior.sites.items()},
        **{f"var {n}": s.var for n, s in fit.posterior.sites.items()},
        **of_program,
    }


def main(rank, case, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if case == "together":
        natural_fit, point_fit, loaded_fit = natural(), point(), loaded()
        errors = [
            message(faulty),
            message(point, rank),
            message(lambda: bmr.fit(model(), (X, Y), batch_size=1, progress=False)),
        ]
        few = message(curved, "true", 1)
        seed = message(lambda: bmr.fit(model(), (X, Y), seed=rank, epochs=1, progress=False))
        found = {
            "natural": tensors(natural_fit),
            "point": tensors(point_fit),
            "loaded": tensors(loaded_fit),
            "curved": curved(),
            "curved by a loader": curved(shuffled=True),
            "curved by others": message(
                curved, "true", 101, True, torch.Generator().manual_seed(rank)
            ),
            "grown": message(curved_rows, Grown()),
            "drawn": curved("true"),
            "pruned": [pruned(), pruned(folder / "stopped", True), pruned(folder / "stopped")],
            "pruned by draws": pruned(fisher="true"),
            "pruned with a batch of one row": pruned(rows=76),
            "pruned otherwise": [
                message(pruned, folder / ("none" if rank else "stopped")),
                message(pruned, None, False, "true", 101 - rank),
            ],
            "other rows": message(loaded, torch.Generator().manual_seed(rank)),
            "history": [f.history.to_dict("list") for f in (natural_fit, point_fit)],
        }
        saved = message(saved_while_running, folder / "checkpoints")
        torch.save(
            {
                **found,
                "errors": [*errors, seed],
                "few": few,
                "skipped": faulty_skipped(),
                "saved": saved,
                "seed": Processes().seed(7),
            },
            folder / f"{rank}.pt",
        )
    elif case == "killed":
        (folder / f"{rank}.txt").write_text(message(killed, folder / "checkpoints", 14))
    else:
        torch.save(tensors(killed(folder / "checkpoints", -1)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def faulty_skipped():
    return [message(faulty, 2), message(faulty, 1000)]


if __name__ == "__main__":
    fork_group(main, sys.argv[1], Path(sys.argv[2]))
