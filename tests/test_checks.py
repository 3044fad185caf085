"""What counts as a whole number, wherever an argument must be one."""

import numpy as np
import pytest
import torch

from pyro_bmr.checks import is_whole


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_of_python_and_numpy(value):
    assert is_whole(value) and is_whole(value, 3) and not is_whole(value, 4)


@pytest.mark.parametrize("value", [True, np.True_, 3.0, np.float64(3), "3", None, torch.tensor(3)])
def test_what_is_no_whole_number(value):
    assert not is_whole(value) and not is_whole(value, 0)
