"""`reduce`: which formula for which site of a posterior, over which groups, and what is decided.
The formulas stand in `formulas/`.
"""

from pyro_bmr.reduction.attention_heads import Heads
from pyro_bmr.reduction.groups import Block, NofM
from pyro_bmr.reduction.programs import ScaleFlow, log_prior_ratio, reduction_program
from pyro_bmr.reduction.search import Search, exhaustive_search, greedy_search
from pyro_bmr.reduction.slabs import shared_inclusion

__all__ = [
    "Block",
    "Heads",
    "NofM",
    "ScaleFlow",
    "Search",
    "exhaustive_search",
    "greedy_search",
    "log_prior_ratio",
    "reduction_program",
    "shared_inclusion",
]
