"""Hook for compiled extensions; metadata stands in pyproject.toml."""

from setuptools import setup

setup()
