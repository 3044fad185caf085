"""The mathematics of reduction: each formula file takes tensors and imports torch only; `sites.py` applies them to a `Posterior`."""
