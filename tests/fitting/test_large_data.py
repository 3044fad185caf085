"""Data that are larger than the memory of the process, and loaders with workers."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import pyro_bmr as bmr
from tests.fitting.test_checkpoints import same
from tests.fitting.test_loaders import Own, classifier, fit

MIB = 1 << 20
ROOT = Path(__file__).parents[2]

# with an allowance of 300 MiB, fits rows of a file of 512 MiB
LIMITED = """
import resource, sys
import numpy as np, pandas, torch
from torch import nn
import pyro_bmr as bmr
import pyro_bmr.fitting.fit, sklearn

path, rows = sys.argv[1], int(sys.argv[2])
y = torch.arange(rows) % 3
net = nn.Linear(1024, 3)
model = bmr.BayesianNetwork(net, bmr.Gaussian(), bmr.Categorical())
fit = lambda x, y: bmr.fit(model, (x, y), epochs=1, batch_size=512, progress=False)
fit(torch.randn(600, 1024), y[:600])  # what is imported and allocated once
x = np.memmap(path, np.float32, "r", shape=(rows, 1024))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
used = int(status["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 300 * 2**20,) * 2)
try:
    np.array(x)
    sys.exit("the whole file fits into memory")
except MemoryError:
    pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fitted = fit(x, y)
prediction = bmr.predict(fitted.program, fitted.posterior, x, draws=2)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert fitted.history.step.iloc[-1] == rows // 512 and len(prediction.probs) == rows
assert grown < 300 * 1024, f"{grown / 1024:.0f} MiB"
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private memory on Linux")
def test_a_file_larger_than_the_memory_is_fitted_and_predicted(tmp_path):
    rows = 512 * MIB // 4096
    with (tmp_path / "x").open("wb") as file:
        file.truncate(rows * 4096)
    call = [sys.executable, "-c", LIMITED, str(tmp_path / "x"), str(rows)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.endswith("done\n"), done.stderr[-2000:]


@pytest.mark.slow
def test_workers_draw_the_same_at_each_call(tmp_path):
    """Their noise as well, which is not that of a loader without workers."""
    loader = partial(DataLoader, Own(noise=0.1), batch_size=32, shuffle=True)
    first, again = (fit(classifier(), loader(num_workers=2)) for _ in range(2))
    assert same(first, again)
    plain = fit(classifier(), DataLoader(Own(), batch_size=32, num_workers=2))
    assert same(plain, fit(classifier(), DataLoader(Own(), batch_size=32)))
    in_order = DataLoader(Own(), batch_size=32, num_workers=2)
    prediction = bmr.predict(plain.program, plain.posterior, in_order)
    assert torch.equal(prediction.probs, bmr.predict(plain.program, plain.posterior, Own()).probs)
