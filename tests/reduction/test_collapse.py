"""Layers that a reduction empties: when it says so, and where the sentence goes."""

import json
import re
import warnings

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.reduction.collapse import collapse, collapse_of

SHAPES = {
    "0.weight": (20, 6),
    "0.bias": (20,),
    "2.weight": (4, 20),
    "4.weight": (20, 4),
    "6.weight": (3, 20),
}


def masks(**living):
    """All of SHAPES, of which `living` keeps the first units of the layers it names, as in _2=3."""
    whole = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    for name, count in living.items():
        whole[f"{name[1:]}.weight"][count:] = False
    return whole


def bottleneck(weak="2.weight", rows=10**6):
    """A posterior in which the weights of one layer have the least evidence each."""
    generator = torch.Generator().manual_seed(3)
    mean = {
        name: 1 + 0.1 * torch.rand(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }
    var = {
        name: torch.full(shape, 0.9 if name == weak else 0.01, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }
    return bmr.Posterior.from_moments(mean, var, bmr.Gaussian(1.3), rows=rows)


@pytest.mark.parametrize(
    "after, figure",
    [
        (
            masks(_2=0),
            r"'2\.weight' \(0 of 4\).*the other layers keep 43 of 43.*kept=\{'2\.weight': 0\.5\}",
        ),
        (masks(_6=0), r"'6\.weight' \(0 of 3\)"),
        (masks(_0=1), r"less than a tenth .* '0\.weight' \(1 of 20\)"),
        # a bias lives
        (
            masks(_0=0, _2=0, _4=0, _6=0),
            r"no unit is kept in layer '0\.weight' \(0 of 20\), '2\.weight'",
        ),
        (masks(_0=2), None),  # a tenth
        # the median of the others has no more than half: 4 of 4, 4 of 20, 1 of 3
        (masks(_0=1, _4=4, _6=1), None),
        (masks(_2=1), None),
        # the empty model
        ({name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()}, None),
    ],
)
def test_which_masks_are_a_collapse(after, figure):
    sentence = collapse(after, masks())
    if figure is None:
        assert sentence is None
    else:
        assert sentence is not None and len(sentence) < 600
        assert re.search(figure, sentence), sentence


def test_what_was_empty_before_is_not_said_again():
    assert collapse(masks(_2=0, _0=1), masks(_2=0, _0=1)) is None
    assert "'6.weight'" in collapse(
        masks(_2=0, _6=0), masks(_2=0)
    ) and "'2.weight'" not in collapse(masks(_2=0, _6=0), masks(_2=0))


def test_a_model_of_one_layer_may_lose_all_its_weights():
    before = {"weight": torch.ones(1, 5, dtype=torch.bool), "bias": torch.ones(1, dtype=torch.bool)}
    assert collapse({**before, "weight": torch.zeros(1, 5, dtype=torch.bool)}, before) is None
    noise = bmr.Posterior.from_moments(
        {"weight": torch.zeros(1, 5), "bias": torch.ones(1)},
        {"weight": torch.tensor(0.01), "bias": torch.tensor(0.01)},
        bmr.Gaussian(1.0),
    )
    # an intercept; a warning would be an error here
    assert bmr.reduce(noise, to=bmr.Gaussian(scale=0)).masks["weight"].sum() == 0


def test_fused_projections_and_gains_are_layers():
    before = {
        "a.in_proj_weight": torch.ones(12, 4, dtype=torch.bool),
        "norm.weight": torch.ones(4, dtype=torch.bool),
        "conv.weight": torch.ones(4, 2, 3, 3, dtype=torch.bool),
    }
    value = {**before, "a.in_proj_weight": torch.arange(12)[:, None].expand(12, 4) < 8}
    assert "'a.in_proj_weight (value)' (0 of 4)" in collapse(
        value, before
    ) and "kept={'a.in_proj_weight': 0.5}" in collapse(value, before)
    assert "'norm.weight' (0 of 4)" in collapse(
        {**before, "norm.weight": torch.zeros(4, dtype=torch.bool)}, before
    )
    assert "'conv.weight' (0 of 4)" in collapse(
        {**before, "conv.weight": torch.zeros(4, 2, 3, 3, dtype=torch.bool)}, before
    )
    tokens = {
        **before,
        "token": torch.zeros(1, 1, 4, dtype=torch.bool),
        "position": torch.zeros(1, 5, 4, dtype=torch.bool),
    }
    # added: zeros are no harm
    assert collapse(tokens, {name: torch.ones_like(mask) for name, mask in tokens.items()}) is None
    # not three times as many rows as columns: one layer
    square = {**before, "a.in_proj_weight": before["a.in_proj_weight"][:, :3]}
    assert (
        collapse({**square, "a.in_proj_weight": value["a.in_proj_weight"][:, :3]}, square) is None
    )


@pytest.mark.parametrize("per", ["weight", "unit"])
def test_reduce_warns_and_its_result_remembers(per, tmp_path):
    post = bottleneck()
    with pytest.warns(bmr.PyroBMRWarning, match=r"'2\.weight' \(0 of 4\)") as caught:
        reduction = bmr.reduce(post, to=bmr.Gaussian(scale=0), per=per, kept=0.7)
    assert (
        len(caught) == 1
        and caught[0].filename == __file__
        and (str(caught[0].message),) == reduction.warnings
    )
    assert reduction.kept > 0.6 and not reduction.masks["2.weight"].any()
    reduction.save(tmp_path)
    assert bmr.Reduction.load(tmp_path).warnings == reduction.warnings
    assert reduction.only("0.*").warnings == () and reduction.only("2.*").warnings != ()
    # the mend
    assert bmr.reduce(post, to=bmr.Gaussian(scale=0), per=per, kept={"*": 0.7}).warnings == ()
    with pytest.warns(bmr.PyroBMRWarning, match="layer collapse"):
        net = bmr.export(plain(), reduction.posterior)
    assert net(torch.randn(9, 6).double()).std(0).max() < 1e-12
    for write in (
        bmr.save,
        lambda net, folder, report: bmr.deploy(
            net, folder, torch.randn(3, 6).double(), report=report, seconds=0.001
        ),
    ):
        write(net, tmp_path / "out", {"warnings": ["of the user"]})
        said = json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]
        assert said[0] == "of the user" and "'2.weight' (0 of 4)" in said[1] and len(said) == 2
    assert collapse_of(plain().state_dict()) == []


def plain():
    net = nn.Sequential(
        nn.Linear(6, 20),
        nn.ReLU(),
        nn.Linear(20, 4, bias=False),
        nn.ReLU(),
        nn.Linear(4, 20, bias=False),
        nn.ReLU(),
        nn.Linear(20, 3, bias=False),
    )
    return net.double()


def test_a_fit_with_reductions_warns_once_at_its_end():
    torch.manual_seed(0)
    x, net = (
        torch.randn(40, 3),
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 1)),
    )
    program = bmr.BayesianNetwork(net, bmr.Gaussian(0.5), bmr.Normal())
    every = bmr.Every(
        epochs=2, to={"2.*": bmr.Gaussian(scale=0)}, threshold=-1e9, start=0.3, stop=1.0
    )
    with pytest.warns(bmr.PyroBMRWarning, match=r"'2\.weight' \(0 of 2\)") as caught:
        fitted = bmr.fit(
            program, (x, x[:, 0]), epochs=10, batch_size=40, reduce=every, progress=False
        )
    ours = [w for w in caught if "not converged" not in str(w.message)]
    assert len(ours) == 1 and ours[0].filename == __file__ and fitted.posterior.rows == 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the fit has not converged")
        bmr.fit(
            program,
            (x, x[:, 0]),
            epochs=2,
            reduce=bmr.Every(epochs=1, stop=1.0, threshold=1e9),
            progress=False,
        )


def test_a_pattern_leaves_the_sites_that_it_does_not_divide():
    post = bottleneck()
    with pytest.warns(
        bmr.PyroBMRWarning, match=r"NofM\(2, 4\) leaves site '0\.weight' \(6 inputs\) out"
    ) as caught:
        reduction = bmr.reduce(
            post, to={"*.weight": bmr.Gaussian(scale=0)}, per=bmr.reduction.NofM(2, 4)
        )
    assert len(caught) == 1 and reduction.masks["0.weight"].all()
    assert (reduction.masks["2.weight"].view(4, 5, 4).sum(-1) == 2).all()
    assert reduction.only("2.*").warnings == reduction.warnings
