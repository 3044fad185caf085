"""What a fit reads and imports first, ready before the fits of test_killed_fits.py are forked: they
are killed fifty times, and each would pay for it.
"""

import torch

import pyro_bmr as bmr
from pyro_bmr.data.named import sources
from tests.fitting.test_killed_fits import SIZES, rows

torch.set_num_threads(1)
# the first optimiser imports what torch leaves for later
bmr.adam(1e-3)([torch.zeros(1, requires_grad=True)])
for name in SIZES:
    if name == "blobs" or sources()[name].installed():
        rows(name)
