"""From masks to a smaller network with the same function: a graph, the analysis of its channels,
and the graph rebuilt with those that are kept.
"""

from pyro_bmr.shrinking.masked_network import masked
from pyro_bmr.shrinking.plan import ShrinkPlan, shrink, shrink_plan

__all__ = ["ShrinkPlan", "masked", "shrink", "shrink_plan"]
