"""Small networks of the kinds that people use, from the fit to the deployed file.

`python benchmarks/network_kinds.py` fills the table of docs/results/network_kinds.md. The networks
are those of tests/shrinking/kinds.py, with random weights and targets. Each is fitted for three
epochs and by its curvature, reduced by unit to half of its weights, exported, shrunk and deployed.
`--kept` takes another share, or "evidence". A row says how many parameters are left, whether the
result is of the network's own class, and how far the outputs are from those of the masked network,
relative to the largest output. A network that cannot be taken to the end is named with the error.
`--peer` compares `shrink` with another tool instead, which has to be installed.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import pyro_bmr as bmr

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.pages import fill, table
from benchmarks.parts.pruning_peers import PEERS, compared
from pyro_bmr.data.inputs import called
from pyro_bmr.shrinking.verification import difference, leaves
from tests.shrinking.kinds import KINDS

PAGE = Path("docs/results/network_kinds.md")
COLUMNS = ["network", "parameters", "result", "float32", "float64", "ONNX"]
PEER_COLUMNS = ["network", "all groups", "right groups", "parameters", "the tool", "`shrink`"]
SHRUNK_TO = {"float32": 1e-5, "float64": 1e-12}


class OneOutput(nn.Module):
    """A network with its outputs side by side in one tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, given: Any) -> Tensor:
        outputs = leaves(called(self.net, given))
        return torch.cat([p.flatten(1) if p.ndim > 1 else p[:, None] for p in outputs], 1)


class OneOutputOfSeveral(OneOutput):
    """The same for a network of several inputs."""

    def forward(self, *inputs: Any) -> Tensor:
        return super().forward(inputs)


def in_double(net: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """A copy of both in float64, complex numbers included."""
    net = copy.deepcopy(net)
    for number in (*net.parameters(), *net.buffers()):
        if number.is_floating_point() or number.is_complex():
            number.data = number.data.to(torch.promote_types(number.dtype, torch.float64))
    return net, tree_map(lambda t: t.double() if t.is_floating_point() else t, example)


@torch.no_grad()
def shrunk(net: nn.Module, masks: Any, example: Any) -> tuple[Any, float]:
    """The plan, and how far the smaller network is from the masked one."""
    plan = bmr.shrinking.shrink_plan(net, masks, example)
    wrong, size = difference(
        *(leaves(called(one, example)) for one in (bmr.shrinking.masked(net, masks), plan.apply()))
    )
    return plan, wrong / max(size, 1e-3)


def row(name: str, kept: float | None) -> list[str]:
    torch.manual_seed(0)
    net, example = KINDS[name]()
    net.eval()
    if not isinstance(called(net, example), Tensor):
        net = OneOutputOfSeveral(net) if isinstance(example, tuple) else OneOutput(net)
    shape = called(net, example).shape
    y = torch.randn(shape[:1] if shape[1:] == (1,) else shape)
    likelihood = bmr.Normal(noise=0.5)
    bmr.curvature(net, (example, y), likelihood, structure="diagonal", progress=False)
    program = bmr.BayesianNetwork(net, bmr.Gaussian(1.0), likelihood)
    fit = bmr.fit(program, (example, y), epochs=3, progress=False)
    reduction = bmr.reduce(fit.posterior, to=bmr.Gaussian(scale=0), per="unit", kept=kept)
    dense = bmr.export(fit.program, reduction.posterior)
    plan, single = shrunk(dense, reduction.masks, example)
    dense64, example64 = in_double(dense, example)
    double = shrunk(dense64, reduction.masks, example64)[1]
    assert single <= SHRUNK_TO["float32"] and double <= SHRUNK_TO["float64"], (single, double)
    before, after = plan.parameters
    with tempfile.TemporaryDirectory() as folder:
        files = bmr.deploy(
            plan.apply(), folder, example, formats=["program", "onnx"], seconds=0, batches=(1,)
        ).set_index("format")
    return [
        name, f"{before:,} → {after:,} ({after / before:.2f})",
        "own class" if plan.own_class else "graph", f"{single:.0e}", f"{double:.0e}",
        f"{files.loc['onnx', 'difference']:.0e}",
    ]  # fmt: skip


def peer_row(name: str, peer: str) -> list[str]:
    torch.manual_seed(0)
    net, example = KINDS[name]()
    found = compared(net.eval(), example, PEERS[peer])
    sizes = (f"{size:,}" for size in (found.before, found.peer, found.ours))
    return [name, found.together, f"{found.right} of {found.groups}", *sizes]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a part of the names of networks")
    parser.add_argument("--kept", default="0.5", help='a share of the weights, or "evidence"')
    parser.add_argument("--peer", choices=PEERS, help="another tool at the same weights")
    settings = parser.parse_args()
    kept = None if settings.kept == "evidence" else float(settings.kept)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names, rows = [n for n in KINDS if settings.only in n], []
    if settings.peer:
        for name in names:
            rows.append(peer_row(name, settings.peer))
            print(rows[-1], flush=True)
        if not settings.only:
            fill(PAGE, table(PEER_COLUMNS, rows), settings.peer)
        return
    for name in names:
        try:
            rows.append(row(name, kept))
        except Exception as error:  # what the row is there to show
            rows.append([name, f"{type(error).__name__}: {str(error)[:200]}", "", "", "", ""])
        print(rows[-1], flush=True)
    if settings.only or settings.kept != "0.5":
        return
    fill(PAGE, table(COLUMNS, rows))


if __name__ == "__main__":
    main()
