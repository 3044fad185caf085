"""Images for the tests of this folder."""

import pytest

import pyro_bmr as bmr


@pytest.fixture(scope="module")
def digits():
    return bmr.load("digits").x_train[:300].double()
