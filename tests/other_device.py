"""Another device than the CPU, without one: `python -m tests.other_device` runs fits, reductions,
predictions, curvatures, `prune` and `shrink` on it. Results of `prune` and `shrink` are compared
with those of the CPU; of the others it is checked that they run, and where their tensors are.

torch lets a backend be written in Python. The tensors of this one, "other", hold a tensor of the
CPU, and an operation of one of them with a tensor that is not there raises, as on a GPU. As there,
numbers and indices may be on the CPU. It is for a process of its own: the backend stays.
"""

from __future__ import annotations

import contextlib
import sys
import warnings

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import pyro_bmr as bmr
from pyro_bmr.data.inputs import called, of_each
from pyro_bmr.fitting import live_network, loop
from pyro_bmr.fitting.flat_vectors import FlatVectors
from tests.shrinking.kinds import KINDS
from tests.shrinking.networks import random_masks

OTHER = "other:0"
LIVE: list[object] = []
READS: list[str] = []
"""The operations for which the host would have waited for the device."""
WAITED_FOR = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2")
COPIES = ("copy_", "_to_copy", "_copy_from")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class Backend:
    """What torch asks the module of a backend."""

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def get_rng_state(self, device=None):
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state, device=None):
        pass

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def device(self, device):
        return contextlib.nullcontext()


class Generator(torch.Generator):
    """One of the CPU, whatever device is named."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


class OtherTensor(torch.Tensor):
    """A tensor on the other device; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(OTHER),
        )
        made.held = held
        return made

    def tolist(self):
        READS.append("tolist")
        return self.held.tolist()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        self.held = value.held

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.__name__.partition(".")[0]
        device = kwargs.get("device")
        to_cpu = device is not None and torch.device(device).type == "cpu"
        if to_cpu or name in WAITED_FOR:
            READS.append(name)
        if not to_cpu and name not in COPIES:
            held_here = (args[0], args[2:], kwargs) if name in INDEXED else (args, kwargs)
            for t in tree_leaves(held_here):
                if isinstance(t, torch.Tensor) and not isinstance(t, cls) and t.ndim and t.numel():
                    raise RuntimeError(f"tensors on two devices, other:0 and cpu ({operation})")
        with torch.no_grad():
            result = operation(*tree_map(held, args), **tree_map(held, kwargs))
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and isinstance(args[0], torch.Tensor):
            return args[0]
        if kwargs.get("out") is not None:
            return kwargs["out"]
        return result if to_cpu or name == "_local_scalar_dense" else tree_map(there, result)


def held(part):
    if isinstance(part, torch.device):
        return torch.device("cpu") if part.type == "other" else part
    return part.held if isinstance(part, OtherTensor) else part


def there(part):
    is_here = isinstance(part, torch.Tensor) and not isinstance(part, OtherTensor)
    return OtherTensor(part) if is_here else part


def copy_from(source, target, non_blocking=False):
    held(target).copy_(held(source))
    return target


def made(operation):
    """`operation`, which makes a tensor, on the other device."""

    def make(*args, **kwargs):
        known = {k: v for k, v in kwargs.items() if k in ("dtype", "generator")}
        return OtherTensor(operation(*args, **known, device="cpu"))

    return make


def register():
    """Makes "other" a device of this process; the result has to be kept."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(
        "other", backend_module=Backend()
    )
    library = torch.library.Library("aten", "IMPL")
    for name, operation in {
        "empty.memory_format": torch.empty,
        "empty_strided": torch.empty_strided,
        "arange": torch.arange,
        "arange.start": torch.arange,
        "arange.start_step": torch.arange,
        "randperm": torch.randperm,
    }.items():
        library.impl(name, made(operation), "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    live_network._WORTH = 0  # small networks, too, are fitted without their dead units
    small_of = live_network.LiveNetworks._small

    def noted(self, *arguments):
        found = small_of(self, *arguments)
        LIVE.extend([] if found is None else [found])
        return found

    live_network.LiveNetworks._small = noted
    # there are generators of C++ backends only, and no memory to give back
    torch.Generator = Generator
    FlatVectors.release = lambda self: None
    return library


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 2))


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 2),
    )  # fmt: skip


def to_other(data):
    return of_each(lambda t: t.to("other"), data)


def close(found, want, tolerance=1e-4):
    for a, b in zip(tree_leaves(found), tree_leaves(want), strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)


class Named(nn.Module):
    """Makes a tensor on a device that it names, and holds a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)
        self.options, self.tables = {"device": "other"}, [torch.ones(6).to("other")]
        self.__dict__["device"] = torch.device("other")

    @property
    def device(self):
        return self.__dict__["device"]

    def forward(self, x):
        x = (x * self.tables[0]).to(self.device)
        return self.last(self.first(x).relu() * torch.arange(8, device=self.options["device"]))


def check_again():
    """A graph that names the device is read like any other network."""
    net, x = Named().to("other"), torch.randn(3, 6)
    net.first.bias.data = net.first.bias * 0
    mask = torch.ones(8, 6, dtype=torch.bool)
    mask[:3] = False
    small = bmr.shrink(net, {"first.weight": mask}, x)
    assert str(net.device) == "other" and net.options == {"device": "other"}
    plan = bmr.shrinking.shrink_plan(net, {}, x)
    there_and_back = plan._masked
    assert there_and_back.options == net.options and there_and_back.device == net.device
    assert isinstance(there_and_back.tables[0], OtherTensor)
    assert len(plan.latency(x, (1,), seconds=0.01)) == 1
    again = bmr.shrink(small, {}, x)
    for found in (small, again):
        assert {str(p.device) for p in found.parameters()} == {OTHER}
        assert sum(p.numel() for p in found.parameters()) == 5 * 7 + 2 * 6
    close(again(x.to("other")), small(x.to("other")).cpu())


def check_shrink(names):
    for name in names:
        net, example = KINDS[name]()
        masks = random_masks(net, 0.5, "rows", 0)
        want = called(bmr.shrink(net, masks, example), example)
        small = bmr.shrink(net.to("other"), masks, to_other(example))
        assert {str(p.device) for p in small.parameters()} == {OTHER}, name
        close(called(small, to_other(example)), want)


def check_fits(data_on, default=None):
    x, images = torch.randn(200, 6), torch.randn(200, 1, 8, 8)
    y = (x[:, 0] > 0).long()
    spike = bmr.Gaussian(scale=0.0)
    every = bmr.Every(1.0, spike, kept=0.3, stop=0.8)
    for net, rows, prior, options in (
        (mlp, x, bmr.Gaussian("layer"), {"optimizer": bmr.natural_gradient(), "reduce": every}),
        (mlp, x, bmr.Horseshoe(), {}),
        (mlp, x, bmr.Gaussian(), {"guide": bmr.MatrixVariate}),
        (convolutions, images, bmr.Gaussian(), {"reduce": every}),
    ):
        net, data = net().to("other"), of_each(lambda t: t.to(data_on), (rows, y))
        torch.set_default_device(default)
        try:
            program = bmr.BayesianNetwork(net, prior, bmr.Categorical())
            fit = bmr.fit(program, data, epochs=4, progress=False, **options)
            reduction = bmr.reduce(fit.posterior, to=spike, kept=0.5, per="input")
            predicted = bmr.predict(program, reduction.posterior, data[0], draws=4)
            small = bmr.shrink(bmr.export(program, reduction.posterior), {}, data[0])
            assert predicted.probs.isfinite().all()
            assert small(data[0].to("other")).shape == (200, 2)
        finally:
            torch.set_default_device(None)
        assert ("reduce" in options) == bool(LIVE), "the network without its dead units"
        LIVE.clear()
        assert {str(site.mean.device) for site in fit.posterior.sites.values()} == {OTHER}


def check_waits():
    """In a step of a fit the host waits for nothing; it reads the terms of sixteen steps at once,
    and finds what a fit on the CPU has found.
    """
    x = torch.randn(256, 6)
    y = (x[:, 0] > 0).long()
    in_steps: dict[int, list[str]] = {}
    take_step, read_terms, turns = loop.take_step, loop.read_terms, []

    def counted(run, batch, share, number):
        READS.clear()
        take_step(run, batch, share, number)
        in_steps[number] = list(READS)

    def read(run, wait):
        READS.clear()
        found = read_terms(run, wait)
        turns.append((len(found), list(READS)))
        return found

    for prior, options in (
        (bmr.Gaussian("layer"), {"optimizer": bmr.natural_gradient()}),
        (bmr.Gaussian("layer"), {"optimizer": bmr.adam()}),
        (bmr.Gaussian(0.3), {"optimizer": bmr.adam()}),
        (bmr.Horseshoe(), {"optimizer": bmr.adam()}),
        (bmr.SpikeAndSlab(), {"optimizer": bmr.adam()}),
        (bmr.Laplace(0.2), {"optimizer": bmr.adam()}),
        (bmr.Gaussian(0.3), {"guide": bmr.Point}),
        (bmr.Gaussian(0.3), {"guide": bmr.MatrixVariate}),
    ):
        fits = {}
        for device in ("cpu", "other"):
            net, data = mlp().to(device), of_each(lambda t: t.to(device), (x, y))  # noqa: B023
            program = bmr.BayesianNetwork(net, prior, bmr.Categorical())
            loop.take_step, loop.read_terms = counted, read
            turns.clear()
            try:
                fits[device] = bmr.fit(
                    program, data, epochs=2, batch_size=8, progress=False, **options
                )
            finally:
                loop.take_step, loop.read_terms = take_step, read_terms
        # the first steps have the program declare its sites
        late = {number: reads for number, reads in in_steps.items() if number > 2 and reads}
        assert not late, (prior, options, late)
        assert [t for t in turns if t[0]] == 4 * [(16, ["tolist"])], turns
        found, want = (fits[device].history for device in ("other", "cpu"))
        for column in ("expected_log_likelihood", "kl", "step", "skipped"):
            torch.testing.assert_close(
                torch.tensor(found[column].to_numpy()),
                torch.tensor(want[column].to_numpy()),
                rtol=1e-3,
                atol=0.0,
            )


def check_faults():
    """A step that is not finite stops the fit, sixteen steps later at most."""
    x, y = torch.randn(256, 6).to("other"), torch.randint(2, (256,)).to("other")
    program = bmr.BayesianNetwork(mlp().to("other"), bmr.Gaussian(0.3), bmr.Categorical())
    try:
        bmr.fit(program, (x, y), epochs=2, batch_size=8, optimizer=bmr.adam(1e30), progress=False)
    except bmr.errors.FitError as error:
        assert "is not finite" in str(error) and "sixteen at a time" in str(error), error
    else:
        raise AssertionError("expected a FitError")


def check_pruning():
    x, y = torch.randn(200, 6), torch.randint(2, (200,))
    likelihood, few = bmr.Categorical(), {"corrections": 1, "last_corrections": 1}
    pruned = {}
    for device in ("cpu", "other"):
        net, data = mlp().to(device), of_each(lambda t: t.to(device), (x, y))  # noqa: B023
        bmr.curvature(net, data, likelihood, structure="diagonal", progress=False)
        pruned[device] = bmr.prune(
            net, data, likelihood=likelihood, kept=0.3, fisher="empirical", progress=False, **few
        )
    close(pruned["other"].net.cpu().state_dict(), pruned["cpu"].net.state_dict(), 1e-3)


def main(kinds):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    library = register()
    torch.manual_seed(0)
    check_shrink(kinds or ["written_attention", "grouped_bottleneck", "windows"])
    check_again()
    check_fits("other")
    check_fits("other", default="other")
    check_fits("cpu")
    check_waits()
    check_faults()
    check_pruning()
    print("done on the other device", library.kind)


if __name__ == "__main__":
    main(sys.argv[1:])
