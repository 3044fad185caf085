import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def isolated():
    """Each test starts and ends with an empty param store and leaves torch's random state as it was; one thread, as tests run side by side."""
    torch.set_num_threads(1)
    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(20)
        yield
    pyro.clear_param_store()
