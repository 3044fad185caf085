"""What `other_device.py` runs, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_device_that_is_not_the_cpu():
    run = subprocess.run(
        [sys.executable, "-m", "tests.other_device"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "done on the other device" in run.stdout
