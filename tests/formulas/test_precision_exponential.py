"""The law of exponential families against 200 digits on thousands of points, in float32 and in
float64; the answers are in `tests/reference/`.
"""

import numpy as np
import pytest
import torch
import torch.distributions as td

import pyro_bmr as bmr
from tests.formulas.test_precision_gaussian import close
from tests.parameters import others_slow
from tests.reference import exponential

LAW = np.load(exponential.FILE)
CLASSES = {name: getattr(td, name) for name in exponential.FAMILIES} | {
    "Dirichlet": lambda *a: td.Dirichlet(torch.stack(a, -1))
}
ATTRIBUTES = {
    "Normal": ("loc", "scale"), "HalfNormal": ("scale",), "Gamma": ("concentration", "rate"),
    "Beta": ("concentration1", "concentration0"),
    "Dirichlet": ("concentration",), "Poisson": ("rate",), "Bernoulli": ("probs",),
    "Geometric": ("probs",), "VonMises": ("loc", "concentration"),
}  # fmt: skip


@pytest.mark.parametrize("name", exponential.FAMILIES)
@pytest.mark.parametrize("dtype", others_slow([*exponential.DTYPES], "float64"))
def test_exponential_families(name, dtype):
    """ΔF within 1e-9 nats and 1e-10 of itself, since scales are squared, of concentrations to 1e9.

    Parameters to 1e-10 of the largest location: P + Π̃ − Π may leave a millionth of P.
    """
    want = LAW[f"{dtype}_{name}"]
    exists = np.isfinite(want).all(1)
    points = torch.as_tensor(exponential.parameters(name, dtype)[exists])
    prior, post, reduced = (CLASSES[name](*points[:, k].unbind(-1)) for k in range(3))
    close(
        bmr.formulas.natural_delta_f(post, prior, reduced),
        want[exists, 0],
        dtype,
        2 if dtype == "float32" else 1e6,
        1e-9,
    )
    result = bmr.formulas.natural_posterior(post, prior, reduced)
    got = [
        getattr(result, attribute).reshape(len(points), -1).double()
        for attribute in ATTRIBUTES[name]
    ]
    scale = np.abs(want[exists, 1:]) + (
        np.abs(points[..., 0].double().numpy()).max(1)[:, None]
        if name in ("Normal", "VonMises")
        else 0
    )
    close(
        torch.cat(got, 1).flatten(), want[exists, 1:].flatten(), dtype, 8, 1e-10 * scale.flatten()
    )
    assert exists.sum() > 1500


@pytest.mark.parametrize(
    "name",
    [  # of this family each answer takes a second
        pytest.param(name, marks=pytest.mark.slow) if name == "VonMises" else name
        for name in exponential.FAMILIES
    ],
)
def test_the_stored_answers_are_what_the_program_gives(name):
    """A few of each, by mpmath again."""
    for dtype in exponential.DTYPES:
        points = exponential.parameters(name, dtype)
        for k in np.random.default_rng().integers(len(points), size=1):
            np.testing.assert_allclose(
                exponential.answer(name, points[k]), LAW[f"{dtype}_{name}"][k], rtol=1e-15
            )
