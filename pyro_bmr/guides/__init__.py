"""The approximate posteriors: one structure a file. Pyro's own autoguides are accepted wherever these are."""

from pyro_bmr.guides.mean_field import MeanField
from pyro_bmr.guides.point import Point

__all__ = ["MeanField", "Point"]
