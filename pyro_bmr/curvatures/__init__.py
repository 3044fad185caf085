"""The curvature of the loss of a trained network: Kronecker factors, or a diagonal."""

from pyro_bmr.curvatures.curvature import curvature
from pyro_bmr.curvatures.factors import Curvature, LayerCurvature

__all__ = ["Curvature", "LayerCurvature", "curvature"]
