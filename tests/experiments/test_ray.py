"""A study on a local cluster of Ray, one of whose two workers is killed."""

import os
import threading
from importlib.util import find_spec
from pathlib import Path

import joblib
import pandas as pd
import pytest

from tests.experiments.test_studies import (  # noqa: F401
    COUNTED,
    PLAIN,
    blank,
    here,
    kill_one,
    quiet,
    write,
)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("ray") is None, reason="ray is not installed: pip install 'pyro_bmr[ray]'"
)
@pytest.mark.filterwarnings("default")
def test_a_killed_worker_of_ray_loses_nothing(here, blank):  # noqa: F811
    """Only the cell that the worker had begun is trained again."""
    import ray
    from ray.util.joblib import register_ray

    Path("counted.py").write_text(COUNTED)
    write(PLAIN.replace('"mlp:3"', '"counted.py"').replace("seeds = 2", "seeds = 8"))
    killed: list[str] = []
    killer = threading.Thread(target=kill_one, args=(Path("on-cluster"), killed))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    register_ray()
    again = {"max_restarts": -1, "max_task_retries": -1}
    try:
        killer.start()
        with joblib.parallel_config(backend="ray", n_jobs=2, ray_remote_args=again):
            table = quiet("study.toml", "on-cluster").table
        killer.join()
    finally:
        ray.shutdown()
    started = Path("started.txt").read_text().split()
    Path("started.txt").unlink()
    alone = quiet("study.toml", "alone").table
    undisturbed = Path("started.txt").read_text().split()
    assert len(killed) == 1 and killed[0] != str(os.getpid())
    assert len(set(started) - {killed[0], str(os.getpid())}) in (1, 2), "those that went on"
    assert len(started) == len(undisturbed) + 1
    times = ["seconds", "step_ratio"]
    pd.testing.assert_frame_equal(
        table.drop(columns=times), alone.drop(columns=times), check_exact=True
    )
