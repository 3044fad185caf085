#!/usr/bin/env bash
# torch 2.13.0: torch.nn.utils.parametrize.remove_parametrizations on a deep copy removes the tensor
# from the original module.
#
# A parametrized module gets its own class, and the tensor is a property of that class.
# copy.deepcopy copies the module but shares the class. remove_parametrizations deletes the property
# from the class, so the original loses its tensor, although it was not touched. This happens if you
# copy a network to fold its weight norm or spectral norm for inference.
#
# Seen: AttributeError: 'ParametrizedLinear' object has no attribute 'weight', from the original's
# forward, for weight_norm and spectral_norm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/check.py" <<'PY'
import copy

import torch
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

for constraint in (weight_norm, spectral_norm):
    net, x = constraint(torch.nn.Linear(3, 2)), torch.ones(1, 3)
    net(x)
    parametrize.remove_parametrizations(copy.deepcopy(net), "weight")
    try:
        net(x)
    except AttributeError as error:
        print(f"{constraint.__name__}: {error}")
    else:
        raise SystemExit(f"{constraint.__name__}: the original still works, which it did not in 2.13.0")
PY
"$folder/venv/bin/python" "$folder/check.py"
