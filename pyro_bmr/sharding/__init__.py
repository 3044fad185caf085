"""Fits whose posterior is shared out over processes, for networks that do not fit on one card."""

from pyro_bmr.sharding.fit import ShardedFit, sharded_fit
from pyro_bmr.sharding.sharded_posterior import ShardedPosterior, ShardedReduction

__all__ = ["ShardedFit", "ShardedPosterior", "ShardedReduction", "sharded_fit"]
