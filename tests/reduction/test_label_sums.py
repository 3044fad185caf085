"""Sums over groups beside a loop over the entries, with labels that are expanded and ones that are
not.
"""

import math

import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.posteriors.site import Site
from pyro_bmr.reduction.groups import Block, group_labels
from pyro_bmr.reduction.label_sums import at_labels, label_counts, label_sums, labels_in_use, moved

SHAPES = {"conv.weight": (3, 2, 2, 2), "conv.bias": (3,), "fc.weight": (4, 6), "fc.bias": (4,)}
PERS = ("unit", "input", "layer", Block(2, 3))
TARGETS = (bmr.Gaussian(scale=0), bmr.SpikeAndSlab(), bmr.Horseshoe())


def drawn(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    each = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
    kept = torch.rand(shape, generator=generator) < 0.6
    return each.masked_fill(~kept, math.inf), kept


def looped(labels, each, kept):
    """Group → the sum over its kept entries, and their number."""
    found = {}
    for number, value, is_kept in zip(
        labels.flatten().tolist(), each.flatten().tolist(), kept.flatten().tolist(), strict=True
    ):
        if number >= 0 and is_kept:
            total, count = found.get(number, (0.0, 0))
            found[number] = (total + value, count + 1)
    return found


@pytest.mark.parametrize("per", PERS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("expanded", [True, False])
def test_sums_and_counts_of_kept_entries(per, name, expanded):
    labels = group_labels(SHAPES, per)[name]
    labels = labels if expanded else labels.contiguous()
    each, kept = drawn(SHAPES[name], 3)
    want = looped(labels, each, kept)
    sums = label_sums(labels, each, 40, kept)
    counts = label_counts(labels, 40, kept)
    for group in range(40):
        total, count = want.get(group, (0.0, 0))
        assert float(sums[group]) == pytest.approx(total, abs=1e-12)
        assert float(counts[group]) == count
    used = set(labels[kept].tolist())
    assert set(labels_in_use(labels, kept).tolist()) == used
    everything = looped(labels, each.where(kept, 0.0), torch.ones_like(kept))
    assert label_counts(labels, 40).tolist() == [everything.get(g, (0, 0))[1] for g in range(40)]


@pytest.mark.parametrize("per", PERS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_the_number_of_its_group_at_each_entry(per, name):
    labels = moved(group_labels(SHAPES, per)[name], torch.device("cpu"))
    values = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = at_labels(labels, values, -math.inf)
    assert found.shape == labels.shape
    for number, value in zip(labels.flatten().tolist(), found.flatten().tolist(), strict=True):
        assert value == (float(values[number]) if number >= 0 else -math.inf)


@pytest.mark.parametrize(
    ("per", "to"),
    [
        pytest.param(per, to, marks=[pytest.mark.slow] * (to == TARGETS[2] and per != PERS[1]))
        for per in PERS[:3]
        for to in TARGETS
    ],
)
def test_written_out_labels_give_the_same_reduction(to, per):
    prior = bmr.formulas.Diagonal(*torch.tensor([0.0, 1.7], dtype=torch.float64))
    sites = {}
    for k, (name, shape) in enumerate(SHAPES.items()):
        mean, kept = drawn(shape, k)
        var = torch.full(shape, 0.05 + 0.02 * k, dtype=torch.float64)
        sites[name] = Site(mean.where(kept, 0), var.where(kept, 0), prior, mask=kept)
    posterior = bmr.Posterior(sites)
    labels = {name: own.contiguous() for name, own in group_labels(SHAPES, per).items()}
    one, other = (bmr.reduce(posterior, to=to, per=p) for p in (per, labels))
    assert one.delta_f == pytest.approx(other.delta_f, rel=1e-12)
    for name in SHAPES:
        assert torch.equal(one.masks[name], other.masks[name])
        torch.testing.assert_close(
            one.sites[name].drop_log_odds, other.sites[name].drop_log_odds, rtol=1e-12, atol=0
        )


@pytest.mark.filterwarnings("ignore::pyro_bmr.PyroBMRWarning")
@pytest.mark.parametrize("kept", [0.25, 0.5, 0.75])
def test_a_target_of_a_weight_counts_the_biases_of_its_units(kept):
    """So half of 96 units are 48, and half of the original ones also in a second reduction."""
    shapes = {"a.weight": (96, 16), "a.bias": (96,), "b.weight": (5, 96), "b.bias": (5,)}
    prior = bmr.formulas.Diagonal(*torch.tensor([0.0, 1.7], dtype=torch.float64))
    sites = {}
    for k, (name, shape) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(k)
        mean = torch.randn(shape, generator=generator, dtype=torch.float64)
        sites[name] = Site(mean, torch.full_like(mean, 0.1), prior)
    posterior, target = bmr.Posterior(sites), {"a.weight": kept, "b.weight": 1.0}
    options = {"to": bmr.Gaussian(scale=0), "per": "unit", "kept": target}
    once = bmr.reduce(posterior, **options)
    twice = bmr.reduce(once.posterior, **options)
    for masks in (once.masks, twice.masks):
        assert int(masks["a.weight"].any(1).sum()) == round(96 * kept)
        assert torch.equal(masks["a.bias"], masks["a.weight"].any(1))
        assert masks["b.weight"].all() and masks["b.bias"].all()


@pytest.mark.parametrize("kept", [None, 0.5])
def test_entries_in_no_group_stay(kept):
    """As those of a network that is one layer, by unit: its units are the outputs."""
    mean = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior = bmr.formulas.Diagonal(*torch.tensor([0.0, 1.7], dtype=torch.float64))
    posterior = bmr.Posterior({"w": Site(mean, torch.full_like(mean, 0.1), prior)})
    found = bmr.reduce(
        posterior, to=bmr.Gaussian(scale=0), per={"w": torch.full((4, 6), -1)}, kept=kept
    )
    assert found.masks["w"].all() and found.delta_f == 0


def test_a_layer_by_itself_has_no_unit_that_could_go():
    data = torch.randn(50, 4), torch.randint(3, (50,))
    with pytest.raises(bmr.errors.ReductionError, match="per='unit': no group.*weight"):
        bmr.prune(
            torch.nn.Linear(4, 3), data, bmr.Categorical(), kept=0.5, per="unit", progress=False
        )
