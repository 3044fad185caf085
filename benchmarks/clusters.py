"""A study by --jobs, on a local cluster of Dask and on one of Ray, with two workers each, one of
which is killed half-way: the rows must be the same.

    python benchmarks/clusters.py
    python benchmarks/clusters.py --data fashion-mnist --model mlp:300-100 --epochs 0

All methods of benchmarks/study_methods.toml with two seeds. By default on the digits with a network
of 64-20-10 and two epochs each, which takes minutes; with `--epochs 0` as declared, which takes
more than an hour. Killed is the process that has begun the newest cell, once a third of the cells
are finished.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import tomllib

import pyro_bmr as bmr

DECLARED = Path(__file__).with_name("study_methods.toml")
TIMES = ["seconds", "step_ratio"]


def declaration(data: str, model: str, epochs: int) -> dict[str, Any]:
    declared = tomllib.loads(DECLARED.read_text(encoding="utf-8"))
    declared |= {"data": [data], "models": [model], "seeds": 2, "shift": False}
    if epochs:
        declared["settings"]["epochs"] = epochs
        for method in declared["method"]:
            method.update({"epochs": epochs} if "epochs" in method else {})
    return declared


def kill_one(folder: Path, cells: int, killed: list[int]) -> None:
    """Kills the process that has begun the newest cell, when a third of them are finished."""
    while len(list(folder.glob("cells/*/row.json"))) < cells / 3:
        time.sleep(0.05)
    while not killed:
        owners = sorted(folder.glob("cells/*/.owner"), key=lambda path: path.stat().st_mtime)
        with contextlib.suppress(OSError, IndexError):
            number = int(owners[-1].read_text().split()[1])
            os.kill(number, signal.SIGKILL)
            killed.append(number)
        time.sleep(0.01)


@contextlib.contextmanager
def dask() -> Iterator[None]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
        joblib.parallel_config(backend="dask", wait_for_workers_timeout=60),
    ):
        yield


@contextlib.contextmanager
def ray() -> Iterator[None]:
    import ray
    from ray.util.joblib import register_ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    register_ray()
    again = {"max_restarts": -1, "max_task_retries": -1}
    try:
        with joblib.parallel_config(backend="ray", n_jobs=2, ray_remote_args=again):
            yield
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="mlp:20")
    parser.add_argument("--epochs", type=int, default=2)
    given = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as name:
        declared, folder = declaration(**given), Path(name)
        jobs = bmr.study(declared, folder / "jobs", jobs=2, progress=False)
        print(f"--jobs 2: {len(jobs.table)} rows, {len(jobs.failures)} failures", flush=True)
        for cluster in (dask, ray):
            killed: list[int] = []
            out = folder / cluster.__name__
            words = out, len(jobs.table), killed
            killer = threading.Thread(target=kill_one, args=words, daemon=True)
            with cluster():
                killer.start()
                found = bmr.study(declared, out, progress=False)
                killer.join(timeout=1)
            pd.testing.assert_frame_equal(
                found.table.drop(columns=TIMES), jobs.table.drop(columns=TIMES), check_exact=True
            )
            print(f"{cluster.__name__}: the same rows, {len(killed)} worker killed", flush=True)


if __name__ == "__main__":
    main()
