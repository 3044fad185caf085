"""What `shrink` and `deploy` cost on ResNet-18 and DenseNet-121 of timm, beside another checkout of
this library if one is given.

    python benchmarks/shrink_speed.py --beside ../0.2.0

Half of the units of each convolution, drawn at random, are masked. Each measurement is a process of
its own with one thread; the checkouts take turns. Seconds of `shrink`, and of `deploy` in all
formats that both have, with the network before beside it; MB at the peak of `shrink`, above those
before it. Medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
NETWORKS = HERE / "benchmarks/parts/outside_networks.py"
FORMATS = ["state_dict", "safetensors", "half", "program", "onnx", "prune"]
MEASURE = """
import importlib.util, json, sys, tempfile, time, warnings
from pathlib import Path
import torch
import pyro_bmr as bmr

torch.set_num_threads(1)
warnings.simplefilter("ignore")
name, formats, networks = sys.argv[1], sys.argv[2].split(","), sys.argv[3]
spec = importlib.util.spec_from_file_location("outside_networks", networks)
sys.modules[spec.name] = outside = importlib.util.module_from_spec(spec)
spec.loader.exec_module(outside)
torch.manual_seed(0)
net = outside.timm_network(name, 64).net.eval()
example = torch.randn(2, 3, 64, 64)
generator, masks = torch.Generator().manual_seed(0), {}
for key, weight in net.named_parameters():
    if weight.ndim == 4:
        kept = torch.rand(len(weight), generator=generator) < 0.5
        masks[key] = kept.view(-1, 1, 1, 1).expand(weight.shape).clone()


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def timed(call):
    wall, cpu = time.perf_counter(), time.process_time()
    value = call()
    return value, time.process_time() - cpu, time.perf_counter() - wall


before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
small, cpu, wall = timed(lambda: bmr.shrink(net, masks, example))
found = {
    "shrink, s of the processor": cpu,
    "shrink, s of the clock": wall,
    "shrink, MB": (status("VmHWM") - before) / 1e6,
    "parameters": sum(p.numel() for p in small.parameters()),
}
if formats != [""]:
    with tempfile.TemporaryDirectory() as folder:
        _, cpu, wall = timed(
            lambda: bmr.deploy(small, folder, example, formats=formats, before=net)
        )
    found |= {"deploy, s of the processor": cpu, "deploy, s of the clock": wall}
print(json.dumps(found))
"""


def measured(checkout: Path, name: str, formats: list[str]) -> dict[str, float] | str:
    """The figures of one process, or the last line of its error."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, name, ",".join(formats), str(NETWORKS)],
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beside", type=Path, help="the top of another checkout")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    checkouts = [HERE, *([options.beside.resolve()] if options.beside else [])]
    for name, formats in (("resnet18", FORMATS), ("densenet121", [])):
        rows: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
        for turn in range(options.turns):
            for checkout in checkouts if turn % 2 else reversed(checkouts):
                found = measured(checkout, name, formats)
                if isinstance(found, str):
                    print(f"{name}, {checkout.name}: {found}")
                else:
                    rows[checkout].append(found)
        for checkout, done in rows.items():
            for key in done[0] if done else []:
                print(
                    f"{name}, {checkout.name}: {key} {statistics.median(d[key] for d in done):.4g}"
                )


if __name__ == "__main__":
    main()
