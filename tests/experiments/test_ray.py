"""A study on a local cluster of Ray, one of whose two workers is killed."""

from importlib.util import find_spec

import joblib
import pytest

from tests.experiments.test_studies import blank, check_killed_worker, here  # noqa: F401


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("ray") is None, reason="ray is not installed: pip install 'pyro_bmr[ray]'"
)
@pytest.mark.filterwarnings("default")
def test_a_killed_worker_of_ray_loses_nothing(here, blank):  # noqa: F811
    import ray
    from ray.util.joblib import register_ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    register_ray()
    again = {"max_restarts": -1, "max_task_retries": -1}
    try:
        check_killed_worker(joblib.parallel_config(backend="ray", n_jobs=2, ray_remote_args=again))
    finally:
        ray.shutdown()
