"""What all tests share. torch and pyro are imported where they are used: the process that hands out
the tests runs none of them.
"""

import pytest


@pytest.fixture(scope="session", autouse=True)
def cheap_seeds():
    """torch's own seeding keeps the stack of each call for devices that are not there: two
    milliseconds a call, ten thousand calls.
    """
    import torch

    def manual_seed(seed):
        return torch.default_generator.manual_seed(int(seed))

    if not torch.accelerator.is_available():
        torch.manual_seed = torch.random.manual_seed = manual_seed


@pytest.fixture(autouse=True)
def isolated():
    """Each test starts and ends with an empty param store and leaves torch's random state as it
    was; one thread, as tests run side by side.
    """
    import pyro
    import torch

    torch.set_num_threads(1)
    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(20)
        yield
    pyro.clear_param_store()
