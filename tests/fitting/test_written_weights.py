"""The step of every prior that is written out, against the same numbers by autograd: at a fixed
draw, after the first run, which declares the sites.
"""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.fitting.mean_field_step import MeanFieldStep
from pyro_bmr.priors.names import PRIORS as NAMED
from pyro_bmr.priors.tiers import TIERS
from pyro_bmr.priors.weight_form import form_of
from tests.fitting.test_mean_field_step import alive, moved

ROWS, TEMPERATURE = 50, 0.4
X, Y = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
BLOCKS = {"unit": 3, "input": 2}

GAUSSIANS = [
    bmr.Gaussian(0.6, mean=0.2),
    bmr.Gaussian(0.6, mean="init"),
    bmr.Gaussian("empirical"),
    *(bmr.Gaussian("layer", per=tier, concentration=1.7, rate=0.6) for tier in TIERS),
    *(bmr.Gaussian("layer", per=tier, block=block) for tier, block in BLOCKS.items()),
]
GRID = [
    bmr.Horseshoe(0.4, slab, tiers, slab_df, parametrization=form)
    for tiers in (("layer",), ("layer", "weight"), ("layer", "unit"), ("unit", "input"), TIERS)
    for slab, slab_df in ((None, None), (0.7, None), (1.3, 3.5))
    for form in ("half-cauchy", "gamma")
]
HORSESHOES = [
    *GRID,
    bmr.Horseshoe(0.4, tiers=("weight",)),
    bmr.Horseshoe(tiers=("unit", "weight"), block=3, by_fan_in=False),
    bmr.Horseshoe(tiers=("layer", "input"), block=2),
    bmr.Horseshoe.tiered(),
    bmr.Horseshoe.tiered(weights=True),
]
OTHERS = [
    bmr.Laplace(),
    bmr.Laplace(0.4),
    bmr.StudentT(2.6),
    bmr.StudentT(3.0, 0.4),
    bmr.SpikeAndSlab(),
    bmr.SpikeAndSlab(0.3, alpha=1.4, beta=2.5),
    *(bmr.SpikeAndSlab(temperature=0.6, alpha=1.4, beta=2.5, per=tier) for tier in TIERS),
    *(bmr.SpikeAndSlab(temperature=0.6, per=tier, block=b) for tier, b in BLOCKS.items()),
]
PRIORS = [*GAUSSIANS, *HORSESHOES, *OTHERS]


class Blocks(nn.Module):
    """A network whose every tensor has units and inputs that blocks divide: a convolution, linear
    maps, one of them tied to another, and a parameter that the data do not reach.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 2)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.out = nn.Linear(6, 3, bias=False)
        self.unread = nn.Parameter(torch.ones(6, 4))

    def forward(self, x):
        h = self.conv(torch.stack([x, x.flip(1)], 2))[..., 0]
        return self.out(self.two(torch.tanh(self.one(torch.tanh(h)))))


def network(prior, likelihood=None):
    torch.manual_seed(1)
    net = Blocks().double()
    return bmr.BayesianNetwork(net, prior, likelihood or bmr.Categorical(size=ROWS))


def masks_for(guide):
    """Masks of the sites of weights; one of them prunes a whole row."""
    generator = torch.Generator().manual_seed(3)
    masks = {
        s.name: torch.rand(s.shape, generator=generator) < 0.6
        for s in guide.latents
        if s.transform is None
    }
    for mask in masks.values():
        mask[0] = False
    return masks


def check(program, y, masked, estimator, rows=X):
    """Compares two steps of either sign, after the one that declares the sites."""
    guide = moved(bmr.MeanField(program, rows, y, estimator=estimator))
    masks = masks_for(guide) if masked else {}
    step = MeanFieldStep(
        program, guide, ROWS, TEMPERATURE, seed=4, network=program, trained=program.trained
    )
    step.prune(masks)
    living = alive(guide, masks)
    step.run((rows, y), 0)
    for sign in (1.0, -1.0):
        number = next(k for k in range(50) if step.noise.at(k)[1] == sign)
        for parameter in step.trained:
            parameter.grad = None
        draw = step.run((rows, y), number)
        noise = torch.randn_like(guide.loc)
        noise[living] = draw.sign * draw.noise
        draws = [
            bmr.fitting.elbo_terms(program, guide, rows, y, masks=masks, noise=n)
            for n in ((noise, -noise) if estimator == "antithetic" else (noise,))
        ]
        likelihood, kl = (sum(terms) / len(draws) for terms in zip(*draws, strict=True))
        loss = (TEMPERATURE * kl - likelihood) / ROWS
        loc, log_scale, *trained = torch.autograd.grad(
            loss, [guide.loc, guide.log_scale, *step.trained]
        )
        given = [parameter.grad for parameter in step.trained]
        step.write_gradients(draw)
        assert draw.expected_log_likelihood == pytest.approx(likelihood.item(), rel=1e-10)
        assert draw.kl == pytest.approx(kl.item(), rel=1e-10)
        exact = {"rtol": 1e-10, "atol": 1e-13}
        torch.testing.assert_close(step.loc.grad, loc[living], **exact)
        torch.testing.assert_close(step.log_scale.grad, log_scale[living], **exact)
        for own, other in zip(given, trained, strict=True):
            torch.testing.assert_close(own, other, **exact)
    return step


def in_the_fast_suite(prior, masked):
    """Masks in turns, but for the grid of horseshoes. Of that a quarter, such that any two of
    tiers, slab, form and masks are there in each of their combinations.
    """
    if prior not in GRID:
        return masked == PRIORS.index(prior) % 2
    tiers, slab, form = GRID.index(prior) // 6, GRID.index(prior) // 2 % 3, GRID.index(prior) % 2
    return form == (tiers + slab) % 2 and masked == (tiers // 2 + slab) % 2


def with_and_without_masks():
    """Every prior either way."""
    for prior in PRIORS:
        for masked, estimator in ((False, "weight"), (True, "antithetic")):
            slow = not in_the_fast_suite(prior, masked)
            yield pytest.param(
                prior,
                masked,
                estimator,
                id=f"{repr(prior)[:120]}-{'masked' if masked else 'whole'}",
                marks=[pytest.mark.slow] * slow,
            )


@pytest.mark.parametrize(("prior", "masked", "estimator"), [*with_and_without_masks()])
def test_value_and_gradient_are_those_of_autograd(prior, masked, estimator):
    step = check(network(prior), Y, masked, estimator)
    assert set(step.declared) == set(step.parts), "nothing is left to Pyro"


@pytest.mark.parametrize(
    "likelihood",
    [
        bmr.Normal(size=ROWS),
        bmr.Normal(0.8, ROWS),
        bmr.likelihoods.Weighted(bmr.Categorical(size=ROWS), 4),
    ],
    ids=["inferred noise", "half-normal noise", "weighted"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(
    "prior",
    [bmr.Gaussian(0.7), bmr.Gaussian("layer"), bmr.Horseshoe(), bmr.SpikeAndSlab()],
    ids=lambda prior: type(prior).__name__ + str(getattr(prior, "scale", "")),
)
def test_likelihoods_that_need_pyro(prior, masked, likelihood):
    program, normal = network(prior, likelihood), isinstance(likelihood, bmr.Normal)
    rows = X if normal else torch.cat([X, X[:, :1].exp()], 1)
    step = check(program, X[:, :3].sin() if normal else Y, masked, "weight", rows)
    assert set(step.parts) - set(step.declared) == ({"noise"} if normal else set())


class Wider(bmr.Gaussian):
    """A prior of the user's own, which has a `sample` but no form."""

    def sample(self, name, shape, init=None):
        return 2 * super().sample(name, shape, init)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_several_priors_and_parameters_that_are_left(masked):
    priors = {
        "conv.weight": bmr.SpikeAndSlab(),
        "conv.bias": None,
        "*.bias": bmr.Gaussian("layer"),
        "one.*": bmr.Horseshoe(tiers=("layer", "unit")),
        "out.*": bmr.Gaussian(0.4),
        "*": bmr.Laplace(),
    }
    step = check(network(priors), Y, masked, "weight")
    assert set(step.declared) == set(step.parts)
    step = check(network({**priors, "out.*": Wider(0.4)}), Y, masked, "antithetic")
    assert set(step.parts) - set(step.declared) == {"out.weight"}


def test_a_scale_that_is_pruned_is_left_to_pyro():
    program = network(bmr.Horseshoe(tiers=("layer", "unit")))
    guide = bmr.MeanField(program, X, Y)
    step = MeanFieldStep(program, guide, ROWS, TEMPERATURE, seed=4, network=program)
    step.prune({"one.weight_unit": torch.arange(6).view(6, 1) > 1})
    assert "one.weight" not in step.whole.written and "out.weight" in step.whole.written


def test_every_prior_of_the_library_has_a_form():
    """A prior without one takes the general step, which costs several times as much."""
    kinds = {type(prior) for prior in PRIORS}
    for name in bmr.priors.__all__:
        cls = getattr(bmr.priors, name)
        if not getattr(cls, "_is_protocol", False):
            assert cls in kinds, f"{name} is not among the priors of this file"
    for prior in (*PRIORS, *NAMED.values()):
        assert form_of(prior, "w", (6, 4)) is not None
    assert form_of(Wider(0.4), "w", (6, 4)) is None
