"""Steps of other libraries on a network, each as its documentation has it, for `step.py`. What is
not installed raises an ImportError.
"""

from __future__ import annotations

import copy
import importlib
import os
import warnings
from collections.abc import Callable
from functools import reduce
from typing import Any

import pyro
import pyro.optim
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_bmr as bmr

ROWS = 60_000  # of the data whose batches are given
Step = Callable[[], object]


def stock_pyro(net: nn.Sequential, x: Tensor, y: Tensor, elbo: type) -> Step:
    """As one writes it by the book: AutoNormal, ClippedAdam's plain sibling, SVI."""
    model = bmr.BayesianNetwork(copy.deepcopy(net), bmr.Gaussian(1.0), bmr.Categorical(size=ROWS))
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 1e-3}), elbo())
    return lambda: svi.step(x, y)


def torchbnn_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Step:
    bnn = importlib.import_module("torchbnn")
    if any(isinstance(m, nn.Conv2d) for m in net):
        conv = lambda m: bnn.BayesConv2d(  # noqa: E731
            0, 0.1, m.in_channels, m.out_channels, m.kernel_size[0], padding=m.padding
        )
    layers = [
        (
            bnn.BayesLinear(0, 0.1, m.in_features, m.out_features)
            if isinstance(m, nn.Linear)
            else conv(m)
            if isinstance(m, nn.Conv2d)
            else m
        )
        for m in net
    ]
    net = nn.Sequential(*layers)
    kl = bnn.BKLLoss(reduction="sum", last_layer_only=False)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (nn.functional.cross_entropy(net(x), y) + kl(net) / ROWS).backward()
        optimizer.step()

    return step


def bayesian_torch_step(net: nn.Sequential, x: Tensor, y: Tensor, kind: str) -> Step:
    module = importlib.import_module("bayesian_torch.models.dnn_to_bnn")
    net = copy.deepcopy(net)
    settings = {
        "prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0,
        "type": kind, "moped_enable": False, "moped_delta": 0.5,
    }  # fmt: skip
    module.dnn_to_bnn(net, settings)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (nn.functional.cross_entropy(net(x), y) + module.get_kl_loss(net) / ROWS).backward()
        optimizer.step()

    return step


def blitz_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Step:
    modules = importlib.import_module("blitz.modules")
    losses = importlib.import_module("blitz.losses")
    conv = lambda m: modules.BayesianConv2d(  # noqa: E731
        m.in_channels, m.out_channels, m.kernel_size, padding=m.padding
    )
    net = nn.Sequential(
        *(
            (
                modules.BayesianLinear(m.in_features, m.out_features)
                if isinstance(m, nn.Linear)
                else conv(m)
                if isinstance(m, nn.Conv2d)
                else m
            )
            for m in net
        )
    )
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (
            nn.functional.cross_entropy(net(x), y) + losses.kl_divergence_from_nn(net) / ROWS
        ).backward()
        optimizer.step()

    return step


def ivon_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Step:
    net = copy.deepcopy(net)
    optimizer = importlib.import_module("ivon").IVON(net.parameters(), lr=0.1, ess=ROWS)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def tyxe_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Step:
    """The step of `VariationalBNN.fit`, with the function of Pyro 1.8 that TyXe 0.0.2 calls."""
    tyxe = importlib.import_module("tyxe")
    if not hasattr(pyro.util, "deep_getattr"):
        pyro.util.deep_getattr = lambda thing, path: reduce(getattr, path.split("."), thing)
    prior = tyxe.priors.IIDPrior(pyro.distributions.Normal(0.0, 1.0))
    likelihood = tyxe.likelihoods.Categorical(ROWS)
    bnn = tyxe.VariationalBNN(copy.deepcopy(net), prior, likelihood, tyxe.guides.AutoNormal)
    svi = SVI(bnn.model, bnn.guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    return lambda: svi.step((x,), y)


def posteriors_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Step:
    """Variational inference with a diagonal normal, as in its own examples."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of tensordict, of each of its classes
        posteriors = importlib.import_module("posteriors")
    torchopt = importlib.import_module("torchopt")

    def log_posterior(parameters: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Any:
        outputs = torch.func.functional_call(net, parameters, (batch[0],))
        log_prior = posteriors.diag_normal_log_prob(parameters)
        return -nn.functional.cross_entropy(outputs, batch[1]) + log_prior / ROWS, outputs

    transform = posteriors.vi.diag.build(
        log_posterior, torchopt.adam(lr=1e-3), temperature=1 / ROWS, init_log_sds=-3.0
    )
    state = transform.init({name: p.detach() for name, p in net.named_parameters()})

    def step() -> None:
        nonlocal state
        state, _ = transform.update(state, (x, y))

    return step


def numpyro_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Step:
    """Jitted; plain multilayer perceptrons only."""
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    )
    numpyro, jax = importlib.import_module("numpyro"), importlib.import_module("jax")
    infer = importlib.import_module("numpyro.infer")
    dist = importlib.import_module("numpyro.distributions")
    if any(isinstance(m, nn.Conv2d) for m in net):
        raise ImportError("numpyro: multilayer perceptrons only")
    layers = [m for m in net if isinstance(m, nn.Linear)]
    batch = lambda: (  # noqa: E731
        jax.numpy.asarray(x.flatten(1).numpy()),
        jax.numpy.asarray(y.numpy()),
    )

    def model(x: object, y: object) -> None:
        for k, layer in enumerate(layers):
            shape = (layer.in_features, layer.out_features)
            w = numpyro.sample(f"w{k}", dist.Normal(0, 1).expand(shape).to_event(2))
            b = numpyro.sample(f"b{k}", dist.Normal(0, 1).expand(shape[1:]).to_event(1))
            x = x @ w + b
            x = jax.nn.relu(x) if k + 1 < len(layers) else x
        with numpyro.plate("data", ROWS, subsample_size=len(x)):
            numpyro.sample("y", dist.Categorical(logits=x), obs=y)

    svi = infer.SVI(
        model,
        infer.autoguide.AutoNormal(model),
        numpyro.optim.Adam(1e-3),
        infer.TraceMeanField_ELBO(),
    )
    state = svi.init(jax.random.PRNGKey(0), *batch())
    update = jax.jit(svi.update)

    def step() -> None:
        nonlocal state
        state, loss = update(state, *batch())
        loss.block_until_ready()

    return step
