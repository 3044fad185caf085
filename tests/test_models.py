"""Every model in `models/` takes the whole path on real rows; the sizes of the paper's networks are
the paper's.
"""

from dataclasses import replace

import pytest
import torch

import pyro_bmr as bmr
from pyro_bmr.experiments.models import load_model, model_names

DIGITS = bmr.load("digits")
LINEAR = {"linear_regression", "logistic_regression", "lenet_caffe"}
SLOW = {"gru", "lenet", "mlp_mixer", "resnet", "transformer", "vit"}


@pytest.mark.filterwarnings(
    "ignore:ΔF.*parameters > rows", "ignore:the program multiplies two parts of .*self_attn"
)
@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
            for name in sorted(set(model_names()) - LINEAR)
        ),
        "lenet:6-16-120-84-relu",
        pytest.param("resnet:16-32-group", marks=pytest.mark.slow),
    ],
)
def test_lifted_fitted_reduced_exported_and_shrunk(name):
    torch.manual_seed(0)
    program = load_model(name)(DIGITS, bmr.Gaussian())
    # nothing but norm layers is left out
    assert set(program.left) == {n for n, why in program.left.items() if "norm" in why}
    data = replace(
        DIGITS,
        x_train=DIGITS.x_train[:256],
        y_train=DIGITS.y_train[:256],
        x_test=DIGITS.x_test[:64],
        y_test=DIGITS.y_test[:64],
    )
    fit = bmr.fit(program, data, epochs=3, batch_size=64, temperature=0.1, progress=False)
    reduction = bmr.reduce(fit.posterior, bmr.Gaussian(scale=0.0), kept=0.2)
    assert reduction.kept == pytest.approx(0.2, abs=0.01)
    net = bmr.export(fit.program, reduction.posterior)
    with torch.no_grad():
        outputs = net(data.x_test)
    probs = bmr.predict(fit.program, reduction.posterior, data.x_test, draws=0).probs
    torch.testing.assert_close(outputs.softmax(1), probs, rtol=1e-4, atol=1e-5)
    small = bmr.shrinking.shrink_plan(net, {}, data.x_test[:8]).apply()
    with torch.no_grad():
        torch.testing.assert_close(small(data.x_test), outputs, rtol=1e-4, atol=1e-5)


def test_logistic_regression_learns_the_digits():
    fit = bmr.fit(
        load_model("logistic_regression")(DIGITS, bmr.Gaussian(1.0)),
        DIGITS,
        epochs=15,
        optimizer=bmr.adam(0.02),
        progress=False,
    )
    probs = bmr.predict(fit.program, fit.posterior, DIGITS.x_test).probs
    assert bmr.metrics.accuracy(probs, DIGITS.y_test) > 0.93
    with pytest.raises(
        bmr.errors.DataError,
        match="logistic_regression: expected classes, got the real targets of diabetes",
    ):
        load_model("logistic_regression")(bmr.load("diabetes"), bmr.Gaussian(1.0))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mlp:500-500-500-500", 1_149_010),
        ("lenet", 61_706),
        ("lenet:6-16-120-84-relu", 61_706),
        ("vit:paper", 3_186_954),
        ("mlp_mixer:paper", 1_987_722),
    ],
)
def test_sizes_of_the_paper_on_fashion_mnist(name, parameters):
    images = replace(DIGITS, x_train=torch.zeros(8, 1, 28, 28), x_test=torch.zeros(8, 1, 28, 28))
    net = load_model(name)(images, bmr.Gaussian()).net
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(
    "name",
    [
        "resnet:1-32-group",
        "resnet:0",
        "vit:4-30-2-4-2",
        "vit:4-32",
        "mlp_mixer:large",
        "gru:x",
        "transformer:30-2-4-2",
    ],
)
def test_sizes_that_cannot_be_are_refused_with_an_example(name):
    with pytest.raises(
        bmr.errors.ModelError, match=f"{name.split(':')[0]}: expected .*, got .*{name}"
    ):
        load_model(name)(DIGITS, bmr.Gaussian())


def test_curves_and_images_where_they_belong():
    curves = replace(DIGITS, x_train=torch.randn(8, 40), x_test=torch.randn(8, 40))
    for name in ("gru", "transformer"):
        assert load_model(name)(curves, bmr.Gaussian()).net(curves.x_train).shape == (8, 10)
    for name in ("resnet", "vit", "mlp_mixer"):
        with pytest.raises(bmr.errors.DataError, match=f"{name}: expected images"):
            load_model(name)(curves, bmr.Gaussian())
