"""Networks with several inputs: called with the tensors of a tuple or of a dict."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.data.inputs import joined, rows_in


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, a, b):
        return self.first(a) + 2 * self.second(b)


A, B, Y = torch.randn(6, 3), torch.randn(6, 4), torch.tensor([0, 1, 1, 0, 1, 0])


@pytest.mark.parametrize("x", [(A, B), {"b": B, "a": A}], ids=["tuple", "dict"])
def test_a_network_is_called_with_each_of_its_inputs(x):
    net = Two()
    model = bmr.BayesianNetwork(net, bmr.Gaussian(), bmr.Categorical())
    weights = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    logits = A @ weights["first.weight"].T + weights["first.bias"]
    logits = logits + 2 * (B @ weights["second.weight"].T + weights["second.bias"])
    want = logits.log_softmax(1)[torch.arange(6), Y].sum()
    assert torch.allclose(model.log_likelihood(weights, x, Y), want, atol=1e-5)
    assert torch.equal(model(x, Y, weights), Y)


class Named(dict):
    """Outputs as Hugging Face models return them."""

    @property
    def logits(self):
        return self["logits"]


def test_of_named_outputs_the_logits_are_taken():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x):
            return Named(hidden=x, logits=self.inner(x))

    net = Net()
    model = bmr.BayesianNetwork(net, bmr.Gaussian(), bmr.Categorical())
    want = -nn.functional.cross_entropy(net.inner(A), Y, reduction="sum")
    assert torch.allclose(model.log_likelihood(dict(net.named_parameters()), A, Y), want)


def test_rows_of_several_inputs_are_joined_in_order():
    class Pair(NamedTuple):
        a: torch.Tensor
        b: torch.Tensor

    assert rows_in({"a": A, "b": B}) == 6
    parts = joined([{"a": A[:4], "b": B[:4]}, {"a": A[4:], "b": B[4:]}])
    assert torch.equal(parts["a"], A) and torch.equal(parts["b"], B)
    assert torch.equal(joined([Pair(A[:4], B[:4]), Pair(A[4:], B[4:])])[1], B)
