"""Parameters of tests of which the fast suite has a part."""

import pytest


def others_slow(every, *fast):
    """Every parameter, or tuple of several; all but `fast` are marked as slow."""
    assert all(one in every for one in fast)
    return [
        one
        if one in fast
        else pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.slow)
        for one in every
    ]
