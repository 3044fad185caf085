"""Heads of attention layers, by the names of their projections: by hand, and that a head without
its weights changes nothing once its columns of the output are zero.
"""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.errors import ReductionError
from pyro_bmr.reduction import Heads
from pyro_bmr.reduction.attention_heads import KNOWN, head_labels, heads_of

NONE = -1


def rows(labels, name):
    """The group of each row of a site whose columns are alike."""
    own = labels[name]
    assert own.ndim == 1 or bool((own == own[:, :1]).all())
    return (own if own.ndim == 1 else own[:, 0]).tolist()


def columns(labels, name):
    own = labels[name]
    assert bool((own == own[:1]).all())
    return own[0].tolist()


@pytest.mark.parametrize("names", KNOWN, ids=lambda names: names.inputs[0] + "-" + names.output)
def test_the_known_names(names):
    fused, shapes = len(names.inputs) == 1, {}
    for block in ("a.0.", "a.1."):
        for name in names.inputs:
            width = 12 if fused else 4
            shapes[f"{block}{name}.weight"] = (6, width) if names.transposed else (width, 6)
            shapes[f"{block}{name}.bias"] = (width,)
        shapes[f"{block}{names.output}.weight"] = (4, 6) if names.transposed else (6, 4)
        shapes[f"{block}{names.output}.bias"] = (6,)
    shapes["a.0.mlp.output.dense.weight"] = shapes["mlp.proj.weight"] = (6, 4)
    found = head_labels(shapes, 2)
    along, across = (columns, rows) if names.transposed else (rows, columns)
    for block, first in (("a.0.", 0), ("a.1.", 2)):
        own = [first, first, first + 1, first + 1]
        for name in names.inputs:
            want = 3 * own if fused else own
            assert along(found, f"{block}{name}.weight") == want
            assert rows(found, f"{block}{name}.bias") == want
        assert across(found, f"{block}{names.output}.weight") == own
        assert rows(found, f"{block}{names.output}.bias") == [NONE] * 6
    for other in ("a.0.mlp.output.dense.weight", "mlp.proj.weight"):
        assert bool((found[other] == NONE).all()) and found[other].shape == (6, 4)


def test_keys_and_values_with_fewer_heads():
    """Four heads of queries of width 2, two of keys and values: heads 0, 1 read the first of
    them."""
    shapes = {"x.q_proj.weight": (8, 5), "x.k_proj.weight": (4, 5), "x.v_proj.weight": (4, 5)}
    found = head_labels({**shapes, "x.o_proj.weight": (5, 8)}, {"x": 4})
    assert rows(found, "x.q_proj.weight") == [0] * 4 + [1] * 4
    assert rows(found, "x.k_proj.weight") == rows(found, "x.v_proj.weight") == [0, 0, 1, 1]
    assert columns(found, "x.o_proj.weight") == [0] * 4 + [1] * 4


class Attention(nn.Module):
    """Attention of grouped heads with names of its own."""

    def __init__(self, dim=6, heads=4, groups=2, width=3):
        super().__init__()
        self.heads, self.groups, self.width = heads, groups, width
        self.wq, self.wk, self.wv = (
            nn.Linear(dim, n * width) for n in (heads, groups, groups)
        )  # fmt: skip
        self.wo = nn.Linear(heads * width, dim)

    def forward(self, x):
        q, k, v = (
            f(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for f in (self.wq, self.wk, self.wv)
        )
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        mixed = (q @ k.mT / self.width**0.5).softmax(-1) @ v
        return self.wo(mixed.transpose(1, 2).flatten(2))


def test_names_of_ones_own():
    torch.manual_seed(0)
    net, x = nn.Sequential(Attention(), nn.Linear(6, 3)), torch.randn(5, 4, 6)
    names = Heads(("wq", "wk", "wv"), "wo")
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    found = head_labels(shapes, 4, names)
    pruned, want = (nn.Sequential(Attention(), nn.Linear(6, 3)) for _ in range(2))
    for one in (pruned, want):
        one.load_state_dict(net.state_dict())
    with torch.no_grad():
        for name, p in pruned.named_parameters():
            p[found[name] == 1] = 0
        # the outputs of heads 2 and 3, which read the second group
        want[0].wo.weight[:, 6:] = 0
    torch.testing.assert_close(pruned(x), want(x))
    assert not torch.allclose(pruned(x), net(x))
    assert heads_of(net) == {} and heads_of(nn.TransformerEncoderLayer(6, 3))["self_attn"] == 3
    post = bmr.Posterior.from_moments(
        {name: p.detach() for name, p in net.named_parameters()},
        {name: torch.full_like(p, 0.1) for name, p in net.named_parameters()},
        bmr.Gaussian(1.0),
    )
    masks = bmr.reduce(post, to=bmr.Gaussian(0), per=names, heads=4, kept=0.6).masks
    for name, mask in masks.items():
        for head in (0, 1):
            own = mask[found[name] == head]
            assert bool(own.all()) or not bool(own.any())
    with pytest.raises(ReductionError, match="how many heads has '0'"):
        bmr.reduce(post, to=bmr.Gaussian(0), per=names)


@pytest.mark.slow
def test_prune_takes_the_number_of_heads_from_the_network():
    torch.manual_seed(0)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = Attention(), nn.Linear(6, 2)
            self.attention.num_heads = 4

        def forward(self, x):
            return self.head(self.attention(x).mean(1))

    net, x = Network(), torch.randn(30, 4, 6)
    names = Heads(("wq", "wk", "wv"), "wo")
    few = {"progress": False, "path": [], "corrections": 0, "last_corrections": 0}
    pruned = bmr.prune(net, x, bmr.Categorical(), 0.5, per=names, **few)
    labels = head_labels({n: tuple(m.shape) for n, m in pruned.masks.items()}, 4, names)
    gone = {
        int(head) for name, mask in pruned.masks.items() for head in labels[name][~mask].unique()
    }
    assert len(gone) == 1 and NONE not in gone
    small = bmr.shrink(pruned.net, pruned.masks, x)
    assert small.attention.wk.out_features == 3 and small.attention.wo.in_features == 6
    torch.testing.assert_close(small(x), pruned.net(x))


@pytest.mark.parametrize(
    ("shapes", "heads", "message"),
    [
        ({"q.weight": (4, 4)}, 2, "no site is a projection"),
        ({"qkv.weight": (12, 4), "proj.weight": (4, 4)}, None, "how many heads has ''"),
        ({"qkv.weight": (12, 4), "proj.weight": (4, 4)}, 3, "does not divide"),
        ({"qkv.weight": (12, 4), "proj.weight": (4, 4)}, 0, "a whole number > 0"),
        (
            {"q_proj.weight": (8, 5), "k_proj.weight": (6, 5), "v_proj.weight": (6, 5),
             "o_proj.weight": (5, 8)},
            4, "width 6 of site 'k_proj.weight'",
        ),
    ],
)  # fmt: skip
def test_layers_that_are_refused(shapes, heads, message):
    with pytest.raises(ReductionError, match=message):
        head_labels(shapes, heads)


@pytest.mark.parametrize(
    "arguments", [((), "o"), (("q", "k"), "o"), ("qkv", "o"), (("q", "k", ""), "o"), (("qkv",), 1)]
)
def test_names_that_are_refused(arguments):
    with pytest.raises(ReductionError, match="names of three projections"):
        Heads(*arguments)


def test_fused_projections_of_fewer_keys_are_no_thirds():
    """Four heads of queries and one of keys and values, of width 4, in one."""
    shapes = {"a.qkv.weight": (24, 16), "a.proj.weight": (16, 16)}
    with pytest.raises(ReductionError, match="three times the proj width 16, got 24"):
        head_labels(shapes, 4, Heads(("qkv",), "proj"))
    with pytest.raises(ReductionError, match="no site is a projection"):
        head_labels(shapes, 4)
    # GPT-2's cross attention has keys and values alone in c_attn
    cross = {"x.c_attn.weight": (12, 24), "x.c_proj.weight": (12, 12)}
    own = {"y.c_attn.weight": (12, 36), "y.c_proj.weight": (12, 12)}
    found = head_labels({**cross, **own}, 2)
    assert bool((found["x.c_attn.weight"] == NONE).all())
    assert columns(found, "y.c_attn.weight") == 3 * ([0] * 6 + [1] * 6)


def test_a_mapping_names_the_layers():
    shapes = {"m.in_proj_weight": (12, 4), "m.out_proj.weight": (4, 4)}
    others = {f"x.{name}.weight": (4, 4) for name in "qkvo"}
    found = head_labels({**shapes, **others}, {"m": 2})
    assert rows(found, "m.in_proj_weight") == 3 * [0, 0, 1, 1]
    assert all(bool((found[name] == NONE).all()) for name in others)
    with pytest.raises(ReductionError, match="how many heads has 'm'"):
        head_labels(shapes, {"other": 2})
    for count in (4.0, "4", True):
        with pytest.raises(ReductionError, match="expected a whole number > 0"):
            head_labels(shapes, count)
