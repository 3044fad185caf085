"""The approximate posteriors: one structure a file. Pyro's own autoguides are accepted wherever
these are.
"""

import pyro_bmr.guides.row_maps  # noqa: F401  # adds the rules of linear maps to `RowNoise`
from pyro_bmr.guides.full_rank import FullRank
from pyro_bmr.guides.low_rank_plus_diagonal import LowRankPlusDiagonal
from pyro_bmr.guides.matrix_variate import MatrixVariate
from pyro_bmr.guides.mean_field import MeanField
from pyro_bmr.guides.point import Point
from pyro_bmr.guides.scale_coupled import ScaleCoupled
from pyro_bmr.guides.site_wise import SiteWise

__all__ = [
    "FullRank",
    "LowRankPlusDiagonal",
    "MatrixVariate",
    "MeanField",
    "Point",
    "ScaleCoupled",
    "SiteWise",
]
