#!/usr/bin/env bash
# bayesian-feature-selection 0.1.0: the columns that `get_feature_importance()` marks as selected
# depend on the unit of the columns. In one unit it selects every column, in another none.
#
# Its `beta_inclusion_prob` is the posterior probability of |beta| > 0.01, with beta in the unit of
# the column as given, and `selected` is whether that exceeds 1/2. `HorseshoeGLM.fit` does not
# standardise the columns. A posterior with a standard deviation of 0.05 around 0, as 100 rows of
# unit variance give, has |beta| > 0.01 most of the time. The same data in a unit a thousandth as
# large have no coefficient above 0.01. One would expect an inclusion probability that is near 1 for
# the one true column, small for the others, and the same in every unit.
#
# Here y = 3 x0 + noise with 10 columns, of which 9 have no effect. Seen with jax 0.4.38, numpyro
# 0.15.3:
#   columns times    1: selected 10 of 10, inclusion of the 9 others 0.683 to 0.783
#   columns times 1000: selected  0 of 10, though the mean of 1000 beta0 is 3.2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet bayesian-feature-selection==0.1.0 jax==0.4.38 jaxlib==0.4.38 numpyro==0.15.3
cat > "$folder/check.py" <<'PY'
import numpy as np
from bayesian_feature_selection import HorseshoeGLM
from bayesian_feature_selection.config import InferenceConfig

chain = InferenceConfig(num_warmup=500, num_samples=1000, num_chains=1, use_gpu=False, progress_bar=False)
rng = np.random.default_rng(0)
x = rng.standard_normal((100, 10))
y = 3 * x[:, 0] + rng.standard_normal(100)
selected = {}
for unit in (1, 1000):
    model = HorseshoeGLM().fit(unit * x, y, chain)
    table = model.get_feature_importance().sort_values("feature_idx")
    others = table["beta_inclusion_prob"].to_numpy()[1:]
    effect = unit * float(np.mean(np.asarray(model.mcmc.get_samples()["beta"])[:, 0]))
    selected[unit] = int(table["selected"].sum())
    print(f"columns times {unit}: selected {selected[unit]} of 10, inclusion of the 9 others {others.min():.3f} to {others.max():.3f}, {unit} beta0 = {effect:.2f}")
    assert 2.5 < effect < 3.5, "the posterior does not find the effect any more"
assert selected == {1: 10, 1000: 0}, "the selection has changed"
PY
"$folder/venv/bin/python" "$folder/check.py" 2>/dev/null
