import pyro
import pytest
import torch


def seed_the_cpu(seed):
    return torch.default_generator.manual_seed(int(seed))


if not torch.accelerator.is_available():
    # torch's own keeps the stack of each call for devices that are not there: two milliseconds a call, ten thousand calls
    torch.manual_seed = torch.random.manual_seed = seed_the_cpu


@pytest.fixture(autouse=True)
def isolated():
    """Each test starts and ends with an empty param store and leaves torch's random state as it was; one thread, as tests run side by side."""
    torch.set_num_threads(1)
    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(20)
        yield
    pyro.clear_param_store()
