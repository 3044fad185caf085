"""The packages to install; the rest is in pyproject.toml, which cannot name found packages and one
from another folder together.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["pyro_bmr*"]), "pyro_bmr.models"])
