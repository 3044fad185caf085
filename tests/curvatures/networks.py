"""Small networks and their dense curvature by autograd, for the tests of this folder."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F


def dense_block(net, x, name, hessian):
    """Σ over rows of Jᵀ H J of one parameter, with J by autograd and H = `hessian` of each row's
    output.
    """
    parameter = dict(net.named_parameters())[name].detach()
    total = 0
    for row, h in zip(x.split(1), hessian, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda w, row=row: functional_call(net, {name: w}, (row,)).flatten(), parameter
        ).flatten(1)
        total = total + jacobian.mT @ h @ jacobian
    return total


def softmax_hessian(logits):
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


def kron(pair):
    """The matrix over the flattened weight of a pair (rows, columns)."""
    return torch.kron(*pair)


class Functional(nn.Module):
    """Products in the code of a forward: one by F.linear, one turned, one of a parameter that is
    computed.
    """

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 5))
        self.third, self.gain = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.ones(5))

    def forward(self, x):
        hidden = torch.tanh(F.linear(x, self.first)) @ self.second
        return (self.gain * hidden) @ (2 * self.third).mT


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Mixed(nn.Module):
    """Norms, a token, attention, a convolution in groups and an embedding."""

    def __init__(self):
        super().__init__()
        self.words, self.conv = nn.Embedding(7, 4), nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, 4))
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.batch_norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, tokens):
        x = self.words(tokens)
        x = x + self.conv(x.mT).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.batch_norm(x[:, 0]))
