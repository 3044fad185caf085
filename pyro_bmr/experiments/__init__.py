"""Prior × route × seed, and declared grids: cells, folders, tables, reports and pictures."""

from pyro_bmr.experiments.study import StudyResults

__all__ = ["StudyResults"]
