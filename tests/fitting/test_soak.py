"""Many fits in one process: they leave no memory behind, share no state, and never touch Pyro's
param store.
"""

import gc
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_bmr as bmr
from tests.fitting.test_checkpoints import same
from tests.fitting.test_fit import blobs, classifier

KINDS = (
    {"reduce": bmr.Every(epochs=0.5, start=0.3)},
    {"optimizer": bmr.natural_gradient(), "validation": 0.2},
    {"guide": bmr.Point},
    {"guide": AutoNormal, "scheduler": None},
)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def soak(
    fits: int, folder: Path | None, epochs: int = 6, rows: int = 300
) -> tuple[np.ndarray, list[int], list[bmr.Fit]]:
    """Resident bytes and living tensors after each fit, and the first and last fit of one kind."""
    memory, alive, kept = [], [], []
    gc.collect()
    gc.freeze()  # what was there before is not looked through after each fit
    for k in range(fits):
        checkpoint = folder / str(k % 8) if folder and k % 8 < 4 and k < 8 else None
        done = bmr.fit(
            classifier(bmr.Gaussian()),
            blobs(rows),
            epochs=epochs,
            batch_size=32,
            progress=False,
            checkpoint=checkpoint,
            **KINDS[k % 4],
        )
        if k in (0, 4 * ((fits - 1) // 4)):
            kept.append(done)
        del done
        assert len(pyro.get_param_store()) == 0
        alive.append(tensors())
        memory.append(resident())
    gc.unfreeze()
    return np.array(memory), alive, kept


@pytest.mark.slow
def test_a_fit_leaves_no_tensor_behind():
    _, alive, _ = soak(3, None, epochs=1, rows=64)
    assert len(set(alive)) == 1, alive


@pytest.mark.slow
def test_a_few_fits_leave_no_tensor_behind_and_repeat_each_other(tmp_path):
    _, alive, kept = soak(13, tmp_path, epochs=3)
    assert len(set(alive[4:12])) == 1, alive
    assert same(*kept)


@pytest.mark.slow
def test_two_hundred_fits_leave_no_memory_behind(tmp_path):
    if not Path("/proc/self/statm").exists():
        pytest.skip("the memory of a process is read in /proc")
    memory, alive, kept = soak(200, tmp_path)
    at, late = np.arange(50, 200), memory[50:]
    slope = np.polyfit(at, late, 1)[0]
    # neighbours are not independent: the noise of the slope from the means of blocks
    blocks = late.reshape(10, 15).mean(1)
    centres = at.reshape(10, 15).mean(1)
    residual = blocks - np.polyval(np.polyfit(centres, blocks, 1), centres)
    error = np.sqrt(residual.var(ddof=2) / ((centres - centres.mean()) ** 2).sum())
    print(
        f"\nresident {memory[50] / 2**20:.1f} MB after 50 fits, {memory[-1] / 2**20:.1f} MB after"
        f" 200; slope {slope:.0f} ± {error:.0f} bytes per fit"
    )
    assert slope < max(2 * error, 1024), f"{slope:.0f} ± {error:.0f} bytes per fit"
    assert len(set(alive[50:196])) == 1  # then the last fit of the first kind is kept
    assert same(*kept)
