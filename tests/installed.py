"""Packages that tests need: those that the extra `dev` installs on this system must be there, others may be missing."""

import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def promised(package: str) -> bool:
    """Whether `pip install llamacli[dev]` installs a package on this system, by pyproject.toml."""
    wanted = map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
    return any(each.name == package and (each.marker is None or each.marker.evaluate()) for each in wanted)


def needed(module: str):
    """Import a module. Without it the test is skipped; if `dev` installs it here, the test fails, so that no test is skipped
    unnoticed.
    """
    return import_module(module) if promised(module.partition(".")[0]) else pytest.importorskip(module)
