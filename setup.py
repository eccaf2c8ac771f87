"""The packages are found, not listed: a new folder under src/ is in the wheel without anybody thinking of it.

All other metadata is in pyproject.toml. There setuptools can search src/ only for packages of their own names, and
src/ itself is the package here.
"""

from setuptools import find_packages, setup

setup(packages=["hyperpodrun", *(f"hyperpodrun.{found}" for found in find_packages("src"))])
