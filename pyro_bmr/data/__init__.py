"""Data as tensors ready to fit: named sets, the readers of files, the standardisation and the
held-out split.
"""

from pyro_bmr.data.data_set import Data
from pyro_bmr.data.named import Source, load, sources
from pyro_bmr.data.standardised import split, standardised

__all__ = ["Data", "Source", "load", "sources", "split", "standardised"]
