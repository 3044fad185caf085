"""The loss before and after a reduction, row by row; scipy has the test of the paired
difference.
"""

import pytest
import torch
from scipy import stats

import pyro_bmr as bmr
from pyro_bmr.prediction.predict import ClassPrediction, RealPrediction


def classes(top, of=3):
    probs = torch.nn.functional.one_hot(top, of).double() * 0.7 + 0.1
    return ClassPrediction(probs, torch.zeros(len(top)), torch.zeros(len(top)))


def reals(mean):
    return RealPrediction(mean[None], torch.ones_like(mean)[None])


def test_errors_of_classes():
    y = torch.randint(3, (200,), generator=torch.Generator().manual_seed(0))
    before, after = y.clone(), y.clone()
    before[:11], after[:3], after[50:70] = (y[:11] + 1) % 3, (y[:3] + 1) % 3, (y[50:70] + 1) % 3
    loss = bmr.prediction.paired_loss(classes(before), classes(after), y)
    difference = (after != y).double() - (before != y).double()
    paired = stats.ttest_rel((after != y).double().numpy(), (before != y).double().numpy())
    assert loss.rise == pytest.approx(
        12 / 200
    ) and loss.rise / loss.standard_error == pytest.approx(paired.statistic)
    assert (loss.before, loss.after, loss.rows, loss.worse) == (
        11 / 200,
        23 / 200,
        200,
        True,
    ) and difference.sum() == 12
    assert "error rate rises from 0.055 to 0.115 on 200 rows" in loss.caution()
    back = bmr.prediction.paired_loss(classes(after), classes(before), y)
    assert back.rise == -loss.rise and not back.worse and back.caution() is None


def test_squared_errors_of_real_targets():
    g = torch.Generator().manual_seed(1)
    y, before, noise = (torch.randn(90, generator=g, dtype=torch.float64) for _ in range(3))
    for scale, worse in ((0.02, False), (1.5, True)):
        loss = bmr.prediction.paired_loss(reals(before), reals(before + scale * noise), y)
        first, second = (before - y).square(), (before + scale * noise - y).square()
        paired = stats.ttest_rel(second.numpy(), first.numpy())
        assert (
            loss.rise / loss.standard_error == pytest.approx(paired.statistic)
            and loss.worse is worse
        )
        assert loss.after == pytest.approx(second.mean().item()) and loss.measure == "squared error"


def test_no_difference_is_no_loss_and_one_row_says_nothing():
    y = torch.tensor([0, 1, 2])
    assert not bmr.prediction.paired_loss(classes(y), classes(y), y).worse
    assert not bmr.prediction.paired_loss(classes(y[:1]), classes(y[:1] + 1), y[:1]).worse
    # every row: no doubt about it
    assert bmr.prediction.paired_loss(classes(y), classes((y + 1) % 3), y).worse


def test_what_is_refused():
    y, mean = torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0])
    for before, after, target in (
        (classes(y), reals(y.double()), y),
        (classes(y), classes(y), y[:2]),
        (classes(y), ClassPrediction(torch.full((3, 3), torch.nan), y, y), y),
        (y, y, y),
        (reals(mean[:1]), reals(mean), mean[:1]),
    ):
        with pytest.raises(bmr.errors.DataError):
            bmr.prediction.paired_loss(before, after, target)
