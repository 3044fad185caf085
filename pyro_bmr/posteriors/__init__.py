"""A fit as data: Gaussian moments per site, and where they come from: guides, param stores, draws,
numbers, curvatures.
"""

from pyro_bmr.posteriors.from_mat import MatPosterior, read_mat

__all__ = ["MatPosterior", "read_mat"]
