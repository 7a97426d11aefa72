"""Packages of dskd-fast; metadata and tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dskd_fast", "dskd_fast.*"]), "dskd_fast.kernels"],
    package_dir={"dskd_fast.kernels": "kernels"},
    package_data={"dskd_fast.kernels": ["README.md"]},
)
