# %% [markdown]
# # Which columns of a table matter
#
# A table has one row per patient and one column per measurement. We want to predict the last
# column, and to know which of the others we need. The data are the 442 diabetes patients that
# come with scikit-learn.
#
# We fit a linear regression once, with all columns. Then `reduce` compares the evidence with and
# without each column, without a second fit.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes

import pyro_bmr as bmr

torch.manual_seed(0)
data = bmr.load("diabetes")  # standardised columns, standardised target
columns = load_diabetes().feature_names
len(data.x_train), columns

# %% [markdown]
# ## Fit all columns
#
# The columns are correlated: `s1` to `s6` are six blood values. A `FullRank` guide keeps the
# correlations between the coefficients, so the posterior knows which columns can replace others.

# %%
regression = bmr.BayesianNetwork(
    torch.nn.Linear(10, 1, bias=False), prior=bmr.Gaussian(scale=0.5), likelihood=bmr.Normal()
)
fit = bmr.fit(
    regression,
    data,
    guide=bmr.FullRank,
    epochs=300,
    batch_size=1000,
    optimizer=bmr.adam(0.02),
    progress=False,
)

# %% [markdown]
# ## Reduce
#
# The target of the reduction is a prior of scale zero, under which a coefficient is exactly zero.
# The reduction searches for the set of columns with the highest evidence. `delta_f` is the gain in
# log evidence over the full regression, in nats; 3 nats are odds of 20 to 1.

# %%
reduction = bmr.reduce(fit.posterior, to=bmr.Gaussian(scale=0))
kept = reduction.masks["weight"][0]
print(f"gain: {reduction.delta_f:.1f} nats")
print("kept:", [name for name, alive in zip(columns, kept.tolist(), strict=True) if alive])

# %% [markdown]
# The picture shows each coefficient with two standard deviations, before and after. The columns
# that stay take over what the pruned ones explained.

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for shift, name, posterior in (
    (-0.12, "all columns", fit.posterior),
    (0.12, "reduced", reduction.posterior),
):
    site = posterior["weight"]
    error = 2 * site.var[0].sqrt()
    axes.errorbar(torch.arange(10) + shift, site.mean[0], error, fmt="o", capsize=3, label=name)
axes.axhline(0, color="grey", linewidth=0.8)
axes.set_xticks(range(10), columns)
axes.set_ylabel("coefficient")
axes.legend()
plt.show()

# %% [markdown]
# ## Nothing is lost
#
# On patients that were not in the fit, the smaller regression predicts as well as the full one.
# The error is in standard deviations of the target.

# %%
errors = {}
for name, posterior in (("all columns", fit.posterior), ("reduced", reduction.posterior)):
    prediction = bmr.predict(fit.program, posterior, data.x_test)
    errors[name] = bmr.metrics.rmse(prediction.mean, data.y_test)
    print(f"{name}: RMSE {errors[name]:.3f}")

assert 0 < kept.sum() < 8 and kept[columns.index("bmi")] and reduction.delta_f > 3
assert errors["reduced"] < errors["all columns"] + 0.02
