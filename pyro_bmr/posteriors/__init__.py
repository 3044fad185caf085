"""A fit as data: Gaussian moments per site, and where they come from: guides, param stores, draws,
numbers, curvatures.
"""
