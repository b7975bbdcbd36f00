"""Prints requirements.in from pyproject.toml, so that the dependencies are named once."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
print("# The base install; printed from pyproject.toml by `make lock`.")
print("\n".join(project["dependencies"]))
