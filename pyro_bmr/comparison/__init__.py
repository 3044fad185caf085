"""`compare`: prior × route × seed → one table, and the folder that it is kept in."""

from pyro_bmr.comparison.cells import GUIDES, OPTIMIZERS, ROUTES, Settings, guide_named, optimizer_named, scores
from pyro_bmr.comparison.models import load_model, model_names
from pyro_bmr.comparison.results_folder import summary
from pyro_bmr.comparison.table import compare

__all__ = ["GUIDES", "OPTIMIZERS", "ROUTES", "Settings", "compare", "guide_named", "load_model", "model_names", "optimizer_named", "scores", "summary"]
