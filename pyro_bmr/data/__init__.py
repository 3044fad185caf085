"""Data as tensors ready to fit: named sets, the readers of files, the standardisation and the
held-out split.
"""

from pyro_bmr.data.data_set import Data, split, standardised
from pyro_bmr.data.named import Source, load, sources

__all__ = ["Data", "Source", "load", "sources", "split", "standardised"]
