# %% [markdown]
# # Prune a network, make it smaller, and save it
#
# We train a small network on images of handwritten digits. Units that the data do not need are
# removed during the fit. At the end we have a smaller network in plain torch, and a file that
# loads where Pyro is not installed.

# %%
import json
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import pyro_bmr as bmr

torch.manual_seed(0)
data = bmr.load("digits")  # 1,797 images of 8 x 8 pixels
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))

# %% [markdown]
# ## Fit and prune
#
# `BayesianNetwork` gives each weight a Gaussian prior, whose scale is inferred for each layer.
# `Every(epochs=1)` asks after each epoch which units can go: a unit is pruned if the evidence of
# the network is higher without its weights. They are then exactly zero and stay zero.
#
# Sixty epochs are short, to be quick. The fit has not converged by then, and would warn of it
# ([when a fit is done](../convergence.md)). Leave `epochs` out to fit until it has.

# %%
model = bmr.BayesianNetwork(net, prior=bmr.Gaussian("layer"), likelihood=bmr.Categorical())
warnings.filterwarnings("ignore", "the fit has not converged")
fit = bmr.fit(
    model,
    data,
    epochs=60,
    batch_size=128,
    optimizer=bmr.natural_gradient(),
    reduce=bmr.Every(epochs=1, to=bmr.Gaussian(scale=0), per="unit"),
    progress=False,
)
alive = fit.posterior.masks["1.weight"].any(1)
print(f"{int(alive.sum())} of {len(alive)} hidden units are left")

# %% [markdown]
# Each picture shows the weights of one unit that is left, as an image. Red pixels raise its input
# and blue pixels lower it.

# %%
weights = fit.posterior["1.weight"].mean[alive].reshape(-1, 8, 8).numpy()
figure, grid = plt.subplots(-(-len(weights) // 8), 8, figsize=(7, 1.8), layout="constrained")
for axes, weight in zip(grid.flat, weights, strict=False):
    axes.imshow(weight, cmap="RdBu_r", vmin=-1, vmax=1)
for axes in grid.flat:
    axes.set_axis_off()
plt.show()

# %% [markdown]
# ## Make it smaller
#
# `export` writes the posterior means into a plain torch module. `shrink` then removes the units
# that have lost all their weights, and checks that both networks compute the same function.

# %%
sparse = bmr.export(fit.program, fit.posterior)
small = bmr.shrink(sparse, fit.posterior.masks, data.x_test[:1])
with torch.no_grad():
    outputs, expected = small(data.x_test), sparse(data.x_test)
difference = float((outputs - expected).abs().max())
print(small)
print(f"largest difference of an output: {difference:.1e}")

# %% [markdown]
# ## What it costs
#
# Predictions average over the posterior; the exported network uses its mean.

# %%
prediction = bmr.predict(fit.program, fit.posterior, data.x_test)
averaged = bmr.metrics.accuracy(prediction.probs, data.y_test)
exported = bmr.metrics.accuracy(outputs.softmax(1), data.y_test)
sizes = [sum(p.numel() for p in module.parameters()) for module in (net, small)]
print(f"accuracy {averaged:.3f} averaged, {exported:.3f} exported")
print(f"parameters: {sizes[0]:,} before, {sizes[1]:,} after")

# %% [markdown]
# ## Save it
#
# `save` writes the weights as safetensors and a report beside them. The report has a check sum of
# the file, and for each tensor its shape and how many entries are not zero.

# %%
with tempfile.TemporaryDirectory() as folder:
    bmr.save(small, folder)
    print(sorted(path.name for path in Path(folder).iterdir()))
    report = json.loads(Path(folder, "report.json").read_text())
print(json.dumps(report["tensors"]["1.weight"], indent=1))

# %%
assert exported > 0.9 and difference < 1e-4
assert sizes[1] < 0.25 * sizes[0]
