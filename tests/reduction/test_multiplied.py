"""Pruning the factors of a product entry by entry is warned of once, with their names; groups over
both are not.
"""

import warnings

import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.reduction.multiplied import multiplied

SPIKE = bmr.Gaussian(scale=0)


def posterior(**products):
    """Sites a (4, 6), b (3, 4) and c (3,), each with half of its entries near zero."""
    generator = torch.Generator().manual_seed(2)
    sites = {}
    for name, shape in {"a": (4, 6), "b": (3, 4), "c": (3,)}.items():
        mean = torch.randn(shape, generator=generator) * (
            torch.arange(torch.Size(shape).numel()).view(shape) % 2
        )
        prior = bmr.formulas.Diagonal(torch.zeros(()), torch.ones(()))
        sites[name] = bmr.Site(
            mean, torch.full(shape, 0.01), prior, multiplies=products.get(name, ())
        )
    return bmr.Posterior(sites)


PRODUCT = posterior(a=("b",), b=("a",))
RANK = {
    "a": torch.arange(4)[:, None].expand(4, 6).contiguous(),
    "b": torch.arange(4).expand(3, 4).contiguous(),
}


def said(of, **arguments):
    reduction = quiet(of, **arguments)
    return multiplied(of, reduction.sites, reduction.groups)


def quiet(of, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bmr.reduce(of, **{"to": SPIKE, **arguments})


def test_factors_pruned_apart():
    for arguments in (
        {},
        {"per": "input", "kept": 0.5},
        {"to": bmr.SpikeAndSlab()},
        {"to": {"a": SPIKE}},
    ):
        (message,) = said(PRODUCT, **arguments)
        assert "'a' × 'b'" in message and "per={" in message and "gotchas" in message


def test_what_is_sound_is_not_warned_of():
    assert (
        not quiet(PRODUCT, per=RANK, kept=0.5).masks["a"].all()
        and said(PRODUCT, per=RANK, kept=0.5) == []
    )
    assert (
        said(PRODUCT, to={"a": SPIKE}, per="unit", kept={"a": 0.5}) == []
        and said(PRODUCT, to={"c": SPIKE}) == []
        and said(PRODUCT, to=bmr.Gaussian(0.5)) == []
        and said(posterior()) == []
    )
    assert said(quiet(PRODUCT).posterior) == [], "nothing goes a second time"


def test_many_pairs_are_one_sentence():
    many = {
        f"s{k}": bmr.Site(
            torch.zeros(2), torch.full((2,), 0.01), PRODUCT["a"].prior, multiplies=(f"s{k ^ 1}",)
        )
        for k in range(12)
    }
    (message,) = said(bmr.Posterior(many))
    assert "'s0' × 's1'" in message and "and 3 more" in message and message.count("×") == 3


def test_the_parts_of_a_fused_tensor():
    fused = bmr.Posterior(
        {
            "in_proj_weight": bmr.Site(
                torch.zeros(12, 4),
                torch.full((12, 4), 0.01),
                PRODUCT["a"].prior,
                multiplies=("in_proj_weight",),
            )
        }
    )
    for arguments in ({}, {"per": "unit"}):  # a row of one part and not of another
        assert "two parts of 'in_proj_weight'" in said(fused, **arguments)[0]
    assert said(fused, per="head", heads=2) == []


def test_reduce_warns():
    with pytest.warns(bmr.PyroBMRWarning, match="'a' × 'b'") as caught:
        bmr.reduce(PRODUCT, to=SPIKE)
    assert len([w for w in caught if "×" in str(w.message)]) == 1


def test_parts_and_sequences_of_a_reduction_say_what_is_true_of_them(tmp_path):
    apart, tied = quiet(PRODUCT), quiet(PRODUCT, per=RANK, kept=0.5)

    def said_of(reduction):
        return [message for message in reduction.warnings if "×" in message]

    assert (
        said_of(apart) == said_of(apart.only("a", "c")) == multiplied(PRODUCT, apart.sites, None)
        and said_of(apart.only("c")) == []
    )
    assert (
        said_of(tied.then(quiet(tied.posterior, to={"c": SPIKE})))
        == []
        != said_of(quiet(PRODUCT, to={"c": SPIKE}).then(quiet(PRODUCT, to={"a": SPIKE})))
    )
    apart.save(tmp_path / "reduction")
    assert said_of(bmr.Reduction.load(tmp_path / "reduction")) == said_of(apart)
