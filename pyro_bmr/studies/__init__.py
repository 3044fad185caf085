"""`study`: a declared grid of models, data sets, methods and seeds, run by one command, and the folder that it is kept in."""

from pyro_bmr.studies.declaration import Cell, Study, declare
from pyro_bmr.studies.report import summary_of
from pyro_bmr.studies.running import StudyResults, cells_left, study

__all__ = ["Cell", "Study", "StudyResults", "cells_left", "declare", "study", "summary_of"]
