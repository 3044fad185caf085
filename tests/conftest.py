"""What all tests share. torch and pyro are imported where they are used: the process that hands out
the tests runs none of them.
"""

import gc
import os

import pytest


def pytest_collection_finish(session):
    """What was imported and collected stays to the end: the garbage collector need not look through
    it again and again, nor through all that lives a little longer.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def cheap_traces():
    """torch.export writes the Python stack to each node of a graph: below pytest eighty frames a
    node. Nothing here reads them.
    """
    from traceback import StackSummary

    from torch.utils._traceback import CapturedTraceback

    CapturedTraceback.summary = lambda self: StackSummary()


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


@pytest.fixture(scope="session", autouse=True)
def cheap_disk():
    """No test loses its power; to wait for the disk takes milliseconds, at each of thousands of
    files. What asks for it is tested by its calls.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def isolated(request):
    """Each test starts and ends with an empty param store and leaves torch's random state, and the
    generator that its file shares, as it was: its numbers do not depend on the tests before it. One
    thread, as tests run side by side.
    """
    import pyro
    import torch

    torch.set_num_threads(1)
    pyro.clear_param_store()
    shared = getattr(request.module, "RNG", None)
    state = None if shared is None else shared.bit_generator.state
    generator = getattr(request.module, "GENERATOR", None)
    torch_state = None if generator is None else generator.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(20)
        yield
    if shared is not None:
        shared.bit_generator.state = state
    if generator is not None:
        generator.set_state(torch_state)
    pyro.clear_param_store()
