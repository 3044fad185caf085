# %% [markdown]
# # A model fitted in NumPyro
#
# A model that was fitted elsewhere is reduced here from its draws. This one is a linear regression
# in NumPyro, on the 442 diabetes patients that come with scikit-learn. Ten measurements predict the
# progression of the disease, and we want to know which of them are needed.
#
# If NumPyro is not installed (`pip install numpyro`), the page reads the draws that its own code
# made; they are stored beside it.

# %%
import json
from pathlib import Path

import arviz_base
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_diabetes

import pyro_bmr as bmr

try:
    import jax
    import numpyro
    import numpyro.distributions as dist
except ImportError:
    numpyro = None

diabetes = load_diabetes()
x = diabetes.data / diabetes.data.std(0)
y = (diabetes.target - diabetes.target.mean()) / diabetes.target.std()

# %% [markdown]
# ## The model, and its draws
#
# Each coefficient has the prior N(0, 0.5²). Nothing in the model knows that it will be reduced.

# %%


def model(x, y):
    with numpyro.plate("features", x.shape[1]):
        beta = numpyro.sample("beta", dist.Normal(0.0, 0.5))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(x @ beta, noise), obs=y)


def draws():
    mcmc = numpyro.infer.MCMC(
        numpyro.infer.NUTS(model),
        num_warmup=500,
        num_samples=400,
        num_chains=2,
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(jax.random.PRNGKey(0), x, y)
    return arviz_base.from_numpyro(mcmc, dims={"beta": ["feature"]})


stored = Path(bmr.__file__).parents[1] / "docs" / "gallery" / "numpyro_model.json"
if numpyro is not None:
    tree = draws()
else:
    values = json.loads(stored.read_text(encoding="utf-8"))
    arrays = {name: np.array(value) for name, value in values.items()}
    tree = arviz_base.from_dict({"posterior": arrays}, dims={"beta": ["feature"]})
print({name: dict(values.sizes) for name, values in tree["posterior"].data_vars.items()})

# %% [markdown]
# ## Reduce
#
# `from_arviz` takes the moments of the draws, with the covariance of the ten coefficients. `prior`
# is the one that they were drawn under. The target is a prior of scale zero: the search asks which
# set of coefficients, held at zero, has the highest evidence.

# %%
posterior = bmr.Posterior.from_arviz(tree, prior=bmr.Gaussian(0.5), var_names=["beta"])
reduction = bmr.reduce(posterior, to=bmr.Gaussian(scale=0), search=bmr.reduction.greedy_search)
kept = reduction.masks["beta"]
names = diabetes.feature_names
print(f"gain: {reduction.delta_f:.1f} nats")
print("kept:", [name for name, alive in zip(names, kept.tolist(), strict=True) if alive])

# %% [markdown]
# The exact log evidence of a linear model with a known noise checks the gain. We take the noise at
# its posterior mean.

# %%
noise = float(tree["posterior"]["noise"].mean())


def log_evidence(alive):
    columns = torch.as_tensor(x)[:, alive]
    cov = noise**2 * torch.eye(len(y), dtype=torch.float64) + 0.25 * columns @ columns.T
    zero = torch.zeros(len(y), dtype=torch.float64)
    return float(torch.distributions.MultivariateNormal(zero, cov).log_prob(torch.as_tensor(y)))


exact = log_evidence(kept) - log_evidence(torch.ones(10, dtype=torch.bool))
print(f"exact gain: {exact:.1f} nats")

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for shift, label, found in (
    (-0.12, "all columns", posterior),
    (0.12, "reduced", reduction.posterior),
):
    site = found["beta"]
    error = 2 * site.var.sqrt()
    axes.errorbar(torch.arange(10) + shift, site.mean, error, fmt="o", capsize=3, label=label)
axes.axhline(0, color="grey", linewidth=0.8)
axes.set_xticks(range(10), names)
axes.set_ylabel("coefficient")
axes.legend()
plt.show()

assert kept[names.index("bmi")] and kept.sum() < 8
assert abs(reduction.delta_f - exact) < 1
