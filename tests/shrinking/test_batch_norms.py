"""Batch norms folded into the layers before them: by hand, and the cases that are left."""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.shrinking import fold_batch_norms


def settled(net):
    """Running statistics, gains and offsets that are not neutral."""
    generator = torch.Generator().manual_seed(2)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(generator=generator)
            m.running_var.uniform_(0.4, 2, generator=generator)
            if m.affine:
                nn.init.normal_(m.weight, 1, 0.3, generator=generator)
                nn.init.normal_(m.bias, 0, 0.5, generator=generator)
    return net.double().eval()


def test_weights_and_biases_are_those_of_the_formula():
    torch.manual_seed(0)
    net = settled(nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5, eps=0.02)))
    norm = net[1].requires_grad_(False)
    folded = fold_batch_norms(net, torch.randn(2, 3).double()).requires_grad_(False)
    for unit in range(5):
        scale = float(norm.weight[unit]) / (float(norm.running_var[unit]) + 0.02) ** 0.5
        want = scale * net[0].weight[unit]
        torch.testing.assert_close(folded[0].weight[unit], want, rtol=1e-12, atol=0)
        offset = float(norm.bias[unit]) - scale * float(norm.running_mean[unit])
        assert float(folded[0].bias[unit]) == pytest.approx(offset, rel=1e-12)
    assert isinstance(folded[1], nn.Identity) and isinstance(net[1], nn.BatchNorm1d)


class Activated(nn.BatchNorm2d):
    """A batch norm with an activation in it."""

    def forward(self, x):
        return torch.relu(super().forward(x))


class Branches(nn.Module):
    """A layer that is read twice, one that is used twice, a norm that is shared, a norm before its
    layer, and three pairs.
    """

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)
        self.up, self.acts = nn.ConvTranspose2d(4, 4, 3, groups=2), Activated(4)
        self.twice, self.read = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.loop, self.looped = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.one, self.two, self.shared = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.before = nn.BatchNorm2d(4)
        self.out, self.last = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        h = self.acts(self.up(torch.relu(self.norm(self.conv(x)))))
        a = self.twice(h)
        h = a + self.read(a)
        h = self.looped(self.loop(self.looped(self.loop(h))))
        h = self.shared(self.one(h)) + self.shared(self.two(h))
        return self.last(self.out(self.before(h).mean((2, 3))))


def test_only_a_norm_that_alone_reads_its_layer_is_folded():
    torch.manual_seed(0)
    net, x = settled(Branches()), torch.randn(3, 1, 5, 5).double()
    folded = fold_batch_norms(net, x)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-11, atol=1e-11)
    kinds = {name: type(m).__name__ for name, m in folded.named_children()}
    assert kinds["norm"] == kinds["last"] == "Identity" and kinds["acts"] == "Activated"
    for name in ("read", "looped", "shared", "before"):
        assert kinds[name] == "BatchNorm2d"
        assert torch.equal(getattr(folded, name).weight, getattr(net, name).weight)
    h = torch.randn(2, 4, 3, 3).double()
    torch.testing.assert_close(folded.acts(h), h.relu(), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_pruned_filter_is_removed_before_a_padded_convolution():
    torch.manual_seed(0)
    net = settled(
        nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 4, 3, padding=1), nn.Flatten(), nn.Linear(100, 2),
        )
    )  # fmt: skip
    net[1].bias.data.abs_()  # a constant above 0
    x = torch.randn(2, 1, 5, 5).double()
    masks = {"0.weight": torch.ones(6, 1, 3, 3, dtype=torch.bool)}
    masks["0.bias"] = torch.ones(6, dtype=torch.bool)
    masks["0.weight"][2:] = masks["0.bias"][2:] = False
    assert bmr.shrink(net, masks, x)[0].out_channels > 2
    small = bmr.shrink(fold_batch_norms(net, x), masks, x)
    assert small[0].out_channels == small[3].in_channels == 2


def test_a_network_that_cannot_be_read_is_refused():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(bmr.errors.ShrinkError, match="control flow"):
        fold_batch_norms(Branching(), torch.randn(2, 3))
