# %% [markdown]
# # A model fitted in PyMC
#
# A logistic regression in PyMC, with named dimensions, on the 569 tumours that come with
# scikit-learn: ten mean measurements of the cells, and whether the tumour is benign. The
# measurements are strongly correlated, such as radius, perimeter and area. So several sets of
# columns explain the data nearly as well, and a search over sets is needed.
#
# If PyMC is not installed (`pip install pymc`), the page reads the draws that its own code made;
# they are stored beside it.

# %%
import json
import logging
import warnings
from pathlib import Path

import arviz_base
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score

import pyro_bmr as bmr

try:
    import pymc as pm
except ImportError:
    pm = None

tumours = load_breast_cancer()
x = (tumours.data[:, :10] - tumours.data[:, :10].mean(0)) / tumours.data[:, :10].std(0)
y = tumours.target
names = [name.removeprefix("mean ") for name in tumours.feature_names[:10]]
train, test = np.arange(len(y)) % 2 == 0, np.arange(len(y)) % 2 == 1

# %% [markdown]
# ## The model, and its draws

# %%


def draws():
    logging.getLogger("pymc").setLevel("ERROR")
    warnings.simplefilter("ignore")  # PyTensor asks for a BLAS
    with pm.Model(coords={"feature": names}):
        intercept = pm.Normal("intercept", 0.0, 5.0)
        beta = pm.Normal("beta", 0.0, 3.0, dims="feature")
        pm.Bernoulli("y", logit_p=intercept + x[train] @ beta, observed=y[train])
        return pm.sample(400, tune=500, chains=2, cores=1, random_seed=0, progressbar=False)


stored = Path(bmr.__file__).parents[1] / "docs" / "gallery" / "pymc_model.json"
if pm is not None:
    tree = draws()
else:
    values = json.loads(stored.read_text(encoding="utf-8"))
    arrays = {name: np.array(value) for name, value in values.items()}
    tree = arviz_base.from_dict({"posterior": arrays}, dims={"beta": ["feature"]})
print({name: dict(values.sizes) for name, values in tree["posterior"].data_vars.items()})

# %% [markdown]
# ## Reduce
#
# Each variable of the draws is a site. `prior` names those that may be pruned; the intercept stays,
# under its own prior.

# %%
prior = {"beta": bmr.Gaussian(3.0), "intercept": bmr.Gaussian(5.0)}
posterior = bmr.Posterior.from_arviz(tree, prior=prior)
to = {"beta": bmr.Gaussian(scale=0)}
reduction = bmr.reduce(posterior, to=to, search=bmr.reduction.greedy_search)
kept = reduction.masks["beta"].tolist()
print(f"gain: {reduction.delta_f:.1f} nats")
print("kept:", [name for name, alive in zip(names, kept, strict=True) if alive])

# %% [markdown]
# The kept coefficients predict the tumours that were not in the fit as well as all ten do.

# %%
scores = {}
for label, found in (("all columns", posterior), ("reduced", reduction.posterior)):
    eta = x[test] @ found["beta"].mean.numpy() + found["intercept"].mean.item()
    scores[label] = roc_auc_score(y[test], eta)
    print(f"{label}: area under the curve {scores[label]:.3f}")

# %%
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for shift, label, found in (
    (-0.12, "all columns", posterior),
    (0.12, "reduced", reduction.posterior),
):
    site = found["beta"]
    error = 2 * site.var.sqrt()
    axes.errorbar(np.arange(10) + shift, site.mean, error, fmt="o", capsize=3, label=label)
axes.axhline(0, color="grey", linewidth=0.8)
axes.set_xticks(range(10), names, rotation=30, ha="right")
axes.set_ylabel("coefficient")
axes.legend()
plt.show()

assert 1 < sum(kept) < 8 and reduction.delta_f > 1
assert scores["reduced"] > scores["all columns"] - 0.01
