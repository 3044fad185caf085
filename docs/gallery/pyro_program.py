# %% [markdown]
# # Reduce a Pyro program to a horseshoe
#
# The model is a Pyro program written by hand, and the fit is Pyro's own `SVI`. The library is
# needed only afterwards: it reads the posterior from the param store, and computes what the
# posterior would have been under a horseshoe prior.
#
# ## The program
#
# A Poisson regression: counts whose logarithmic rate depends on 30 columns. Only four of the
# coefficients are not zero.

# %%
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

pyro.clear_param_store()
pyro.set_rng_seed(1)
rows, size = 400, 30
x = torch.randn(rows, size)
true = torch.zeros(size)
true[[2, 7, 11, 23]] = torch.tensor([0.6, -0.4, 0.3, -0.5])
counts = dist.Poisson((0.5 + x @ true).exp()).sample()


def program(x, counts=None):
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    slopes = pyro.sample("slopes", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("counts", dist.Poisson((offset + x @ slopes).exp()), obs=counts)


# %% [markdown]
# ## The fit
#
# Nothing here belongs to the library.

# %%
guide = AutoNormal(program, init_scale=0.05)
optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.05 ** (1 / 600)})
svi = SVI(program, guide, optimizer, Trace_ELBO())
losses = [svi.step(x, counts) for _ in range(600)]
print(f"loss: {losses[0]:.0f} at the start, {sum(losses[-50:]) / 50:.0f} at the end")

# %% [markdown]
# ## From the param store to a posterior
#
# `from_param_store` runs the program once, to find its sites and their priors. It takes the
# locations and scales from the store.

# %%
import pyro_bmr as bmr

posterior = bmr.Posterior.from_param_store(pyro.get_param_store(), program, x, counts)
posterior["slopes"].mean[:4], posterior["slopes"].var[:4].sqrt()

# %% [markdown]
# ## Reduce to a horseshoe
#
# The fit used a normal prior of scale 1 for each slope. `reduce` replaces it by a horseshoe, whose
# global scale is chosen by the evidence. The result has the new posterior and the change of log
# evidence, `delta_f`. No second fit is needed.

# %%
reduction = bmr.reduce(posterior, to={"slopes": bmr.Horseshoe()})
reduction.table()

# %% [markdown]
# A horseshoe shrinks small coefficients to almost zero and leaves large ones nearly as they were.
# Crosses are the true values.

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for shift, name, shown in (
    (-0.15, "normal prior", posterior),
    (0.15, "horseshoe", reduction.posterior),
):
    site = shown["slopes"]
    error = 2 * site.var.sqrt()
    axes.errorbar(torch.arange(size) + shift, site.mean, error, fmt=".", capsize=2, label=name)
axes.plot(true, "kx", label="true")
axes.set_xlabel("column")
axes.set_ylabel("slope")
axes.legend()
plt.show()

# %% [markdown]
# The mask says which coefficients the horseshoe keeps: those that it shrinks by less than half.

# %%
kept = reduction.masks["slopes"]
print("kept:", kept.nonzero()[:, 0].tolist())


def error(estimate):
    return float((estimate - true).square().mean().sqrt())


before, after = error(posterior["slopes"].mean), error(reduction.posterior["slopes"].mean)
print(f"error of the estimate: {before:.3f} before, {after:.3f} after")

assert kept[[2, 7, 11, 23]].all() and kept.sum() < 8
assert after < before and reduction.delta_f > 0
