"""Time and memory of reductions of large posteriors: `python benchmarks/reduction.py` prints one
markdown table; `--json FILE` keeps the numbers.

Each row is one call, in one process, with all that it allocates. The yardstick is one read and one
write of the posterior's tensors (mean and variance): into fresh memory, as any result needs
(`clone`), and into memory that is there already (`copy_`). Times are the best of `--repeats`;
processor seconds stand beside wall seconds, since a busy machine stretches the second.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import pyro_bmr as bmr
from pyro_bmr.posteriors.site import Site
from pyro_bmr.reduction.reduced_site import site_reduction

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.pages import table

COLUMNS = [
    *("call", "weights", "seconds", "cpu_seconds"),
    *("over clone", "over copy_", "extra memory / posterior"),
]


def posterior(n: int, seed: int = 0) -> bmr.Posterior:
    """A sparse layer: a tenth of the weights from N(0, 1.2²), the rest from N(0, 0.05²), each with
    a posterior of its own width; prior N(0, 1.5).
    """
    mean, var = torch.empty(n), torch.empty(n)
    moments(mean, var, torch.Generator().manual_seed(seed))
    return bmr.Posterior(
        {"w": Site(mean, var, bmr.formulas.Diagonal(torch.zeros(()), torch.tensor(1.5)))}
    )


def moments(mean: torch.Tensor, var: torch.Tensor, generator: torch.Generator) -> None:
    """Fills two vectors with the moments of such a layer."""
    for m, v in zip(mean.split(1 << 20), var.split(1 << 20), strict=True):
        m.copy_(
            torch.where(torch.rand(len(m), generator=generator) < 0.1, 1.2, 0.05)
            * torch.randn(len(m), generator=generator)
        )
        v.uniform_(0.001, 0.011, generator=generator)


def measured(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Wall and processor seconds of the fastest call, and the most memory that one call had above
    what stood before it, in bytes.
    """
    walls, processor, extra = [], [], 0
    for _ in range(repeats):
        before = reset_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        walls.append(time.perf_counter() - wall)
        processor.append(time.process_time() - cpu)
        extra = max(extra, peak() - before)
        del result
    return {"seconds": min(walls), "cpu_seconds": min(processor), "extra_bytes": extra}


def reset_peak() -> int:
    """Bytes resident now; from here on `peak` counts (on Linux; elsewhere it counts from the start
    of the process).
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return peak()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(
            line
            for line in status.read_text(encoding="ascii").splitlines()
            if line.startswith("VmHWM")
        )
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def spike_and_slab(n: int, repeats: int) -> list[dict[str, Any]]:
    q = posterior(n)
    site = q["w"]
    size = 8 * n
    target = (torch.empty_like(site.mean), torch.empty_like(site.var))
    fresh = measured(lambda: (site.mean.clone(), site.var.clone()), repeats + 1)
    there = measured(lambda: (target[0].copy_(site.mean), target[1].copy_(site.var)), repeats + 1)

    def decision() -> Any:
        result = site_reduction(q, "w", bmr.SpikeAndSlab())
        return result, result.drop_log_odds <= 0

    rows = [{"call": "clone of mean and var", **fresh}, {"call": "copy_ of mean and var", **there}]
    rows += [{"call": "ΔF, inclusion and masks: site_reduction", **measured(decision, repeats)}]
    rows += [
        {
            "call": "bmr.reduce(posterior, to=SpikeAndSlab())",
            **measured(lambda: bmr.reduce(q, to=bmr.SpikeAndSlab()), repeats),
        }
    ]
    rows += [
        {
            "call": "bmr.reduce(posterior, to=Gaussian(0))",
            **measured(lambda: bmr.reduce(q, to=bmr.Gaussian(0.0)), repeats),
        }
    ]
    for row in rows:
        row |= {
            "weights": n,
            "over clone": row["cpu_seconds"] / fresh["cpu_seconds"],
            "over copy_": row["cpu_seconds"] / there["cpu_seconds"],
        }
        row["extra memory / posterior"] = row.pop("extra_bytes") / size
    return rows


def horseshoe(n: int, repeats: int) -> list[dict[str, Any]]:
    q = posterior(n)
    row = measured(lambda: site_reduction(q, "w", bmr.Horseshoe()), repeats)
    return [
        {
            "call": "site_reduction to Horseshoe()",
            "weights": n,
            "extra memory / posterior": row.pop("extra_bytes") / (8 * n),
            **row,
        }
    ]


def _cell(x: float | str) -> str:
    if not isinstance(x, float):
        return str(x)
    return "" if math.isnan(x) else f"{x:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=100_000_000, help="for the spike and slab")
    parser.add_argument("--horseshoe-weights", type=int, default=10_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = spike_and_slab(args.weights, args.repeats) + horseshoe(args.horseshoe_weights, 1)
    results = pd.DataFrame(rows)[COLUMNS]
    print(f"torch {torch.__version__}, {args.threads} thread(s), {platform.machine()}\n")
    cells = [[_cell(x) for x in row] for row in results.itertuples(index=False)]
    print("\n".join(table(COLUMNS, cells)))
    if args.json:
        args.json.write_text(
            json.dumps(
                {"torch": torch.__version__, "threads": args.threads, "rows": rows}, indent=2
            ),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
