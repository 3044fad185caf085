"""From masks to a smaller network with the same function: a graph, the analysis of its channels,
and the graph rebuilt without the dead ones.
"""

from pyro_bmr.shrinking.plan import ShrinkPlan, masked, shrink, shrink_plan

__all__ = ["ShrinkPlan", "masked", "shrink", "shrink_plan"]
