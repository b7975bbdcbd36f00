import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from gateway.config_reference import page, schema, settings

ROOT = Path(__file__).parents[2]


def errors(values: object) -> list[str]:
    return [error.json_path for error in jsonschema.Draft202012Validator(schema()).iter_errors(values)]


def test_the_page_in_the_repository_is_current():
    assert (ROOT / "docs/configuration.md").read_text() == page(), (
        "make it again: python -m gateway.config_reference > docs/configuration.md"
    )


def test_every_setting_is_explained():
    silent = [s.path for s in settings() if not (s.field.description or s.section)]
    assert not silent


def test_the_schema_is_valid_and_takes_the_repositorys_config():
    jsonschema.Draft202012Validator.check_schema(schema())
    values = yaml.load((ROOT / "config.yaml").read_text(), yaml.BaseLoader)  # texts, as an editor sees dates
    plain = yaml.safe_load((ROOT / "config.yaml").read_text())
    plain["keys"][0]["expires"] = values["keys"][0]["expires"]
    assert errors(plain) == []


@pytest.mark.parametrize(
    "values",
    [
        {"server": {"port": "${PORT:-8080}"}},
        {"logging": {"level": "${LEVEL}", "access": "${ACCESS}"}},
        {"server": {"workers": "auto"}},
        {"server": {"workers": "${N}"}},
        {"keys": [{"name": "a", "key": "${K}", "models": "*"}]},
    ],
)
def test_the_schema_allows_placeholders_for_every_plain_value(values):
    assert errors(values) == []


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"server": {"prot": 1}}, "$.server"),
        ({"server": {"port": 70000}}, "$.server.port"),
        ({"server": {"port": "8080"}}, "$.server.port"),
        ({"logging": {"level": "inof"}}, "$.logging.level"),
        ({"models": {"m": {}}}, "$.models.m"),
    ],
)
def test_the_schema_refuses_what_loading_refuses(values, path):
    assert errors(values) == [path]


def test_the_schema_has_no_values_of_secrets():
    text = json.dumps(schema())
    assert '"writeOnly": true' in text
    assert "*****" not in text
