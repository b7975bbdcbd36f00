"""The recipes of docs/routing.md are configurations that load."""

import re
from pathlib import Path

import pytest
import yaml

from gateway.config import load

PAGE = (Path(__file__).parents[2] / "docs/routing.md").read_text()
RECIPES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
# What the recipes take for granted.
AROUND = {
    name: {"targets": [{"pool": "gpu"}]}
    for name in ("local", "strong", "auto", "claude", "long", "candidate", "small", "smart")
}


@pytest.mark.parametrize("text", RECIPES, ids=[text.splitlines()[1].strip()[:40] for text in RECIPES])
def test_a_recipe_loads(text, tmp_path):
    values = yaml.safe_load(text)
    values["pools"] = {"gpu": {"endpoints": ["http://10.0.0.5:8000/v1"]}}
    values["models"] = AROUND | values.get("models", {})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assert load(path, {}).models


def test_the_page_has_recipes():
    assert len(RECIPES) >= 10
