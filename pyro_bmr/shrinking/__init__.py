"""From masks to a smaller network with the same function: a graph, the analysis of its channels,
and the graph rebuilt with those that are kept.
"""

from pyro_bmr.shrinking.batch_norms import fold_batch_norms
from pyro_bmr.shrinking.masked_network import masked
from pyro_bmr.shrinking.plan import shrink, shrink_plan
from pyro_bmr.shrinking.readers import reader_labels
from pyro_bmr.shrinking.shrink_plan import ShrinkPlan

__all__ = ["ShrinkPlan", "fold_batch_norms", "masked", "reader_labels", "shrink", "shrink_plan"]
