"""Package layout that pyproject.toml cannot express; see docs/layout.md for the folder `kernels/`."""

from setuptools import setup

setup()
