"""The evidence of whole rows and columns of a layer, held against dense algebra."""

import pytest
import torch

from pyro_bmr.formulas import prune_subset
from pyro_bmr.formulas.diagonal import Diagonal
from pyro_bmr.post_training.group_evidence import grouped_delta_f
from pyro_bmr.post_training.layer import precisions
from pyro_bmr.post_training.masks import pruned_at
from tests.post_training.test_layer import SCALE, TEMPERATURE, dense_of, one_layer


def dense_gain(layer, matrix_mask):
    """ΔF of the entries that are True, by the dense covariance; the bias is free."""
    inside = torch.zeros_like(layer.mean, dtype=torch.bool)
    inside[:, : layer.columns] = matrix_mask
    prior = Diagonal(
        torch.zeros(layer.mean.numel()).double(), torch.tensor(SCALE**2, dtype=torch.float64)
    )
    return float(prune_subset(dense_of(layer), prior, inside.flatten())[0])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("by_row", [True, False])
def test_the_evidence_of_rows_and_columns_is_the_dense_one(turned, by_row):
    _, curved, layer = one_layer(turned)
    inverse = precisions(curved, SCALE, TEMPERATURE)
    each = torch.tensor([1, 0, 1, -1]) if by_row else torch.tensor([2, 0, 2, -1, 1])
    labels = each[:, None].expand(4, 5) if by_row else each.expand(4, 5)
    found = grouped_delta_f(layer, inverse, layer.as_parameter(labels), 4)
    for group in range(3):
        if (each == group).any():
            expected = dense_gain(layer, labels == group)
            assert float(found[group]) == pytest.approx(expected, rel=1e-9)
        else:
            assert float(found[group]) == 0
    assert float(found[3]) == 0


@pytest.mark.parametrize("by_row", [True, False])
def test_the_evidence_is_that_given_what_is_held(by_row):
    _, curved, layer = one_layer()
    inverse = precisions(curved, SCALE, TEMPERATURE)
    gone = torch.zeros(4, 5, dtype=torch.bool)
    gone[(1, slice(None)) if by_row else (slice(None), 1)] = True
    after, _, _ = layer.holding(layer.as_parameter(gone))
    each = torch.tensor([0, 3, 2, 0]) if by_row else torch.tensor([0, 3, 2, 0, -1])
    labels = each[:, None].expand(4, 5) if by_row else each.expand(4, 5)
    found = grouped_delta_f(after, inverse, labels, 4)
    for group in (0, 2):
        both = dense_gain(layer, gone | (labels == group))
        expected = both - dense_gain(layer, gone)
        assert float(found[group]) == pytest.approx(expected, rel=1e-8)
    assert float(found[3]) == 0


def test_other_groups_have_no_such_evidence():
    _, curved, layer = one_layer()
    labels = torch.arange(20).view(4, 5)
    assert grouped_delta_f(layer, precisions(curved, SCALE, TEMPERATURE), labels, 20) is None


def test_groups_are_ranked_by_their_own_evidence_per_entry():
    """Two inputs that are alike say little each: their sum over single entries is another order."""
    _, curved, layer = one_layer()
    inverse = lambda _: precisions(curved, SCALE, TEMPERATURE)  # noqa: E731
    labels = {"weight": torch.arange(4)[:, None].expand(4, 5)}
    gains = [dense_gain(layer, labels["weight"] == k) for k in range(4)]
    worst = max(range(4), key=gains.__getitem__)
    pruned = pruned_at({"weight": layer}, 0.75, 0.1, labels, inverse=inverse)["weight"]
    torch.testing.assert_close(pruned, labels["weight"] == worst)
