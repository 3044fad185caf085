"""A fit that begins at a trained network loses nothing before anything is pruned."""

import pytest
import torch
from torch import nn

import pyro_bmr as bmr

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:the fit has not converged")


def trained(net, x, y, epochs):
    """The network after plain training, its rate falling to zero."""
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
    return net


def right(logits, y):
    return float((logits.argmax(1) == y).double().mean())


@pytest.mark.slow
def test_a_trained_convolution_stays_within_0_3_points():
    torch.manual_seed(0)
    data = bmr.load("fashion-mnist")
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 10, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(160, 60), nn.ReLU(), nn.Linear(60, 10)),
    )
    trained(net, data.x_train[:10_000], data.y_train[:10_000], 8)
    model = bmr.BayesianNetwork(net, bmr.Gaussian(mean="init"), bmr.Categorical())
    fit = bmr.fit(
        model,
        (data.x_train[:10_000], data.y_train[:10_000]),
        epochs=bmr.UntilConverged(steps=1000, first=1000),
        optimizer=bmr.natural_gradient(),
        progress=False,
    )
    with torch.no_grad():
        before = right(net(data.x_test), data.y_test)
    prediction = bmr.predict(fit.program, fit.posterior, data.x_test)
    assert before > 0.8 and right(prediction.probs, data.y_test) >= before - 0.003
