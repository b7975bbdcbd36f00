import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from backends.registry import KNOWN
from gateway.commands.check import check

ROOT = Path(__file__).parents[3]
APP = typer.Typer()
APP.command()(check)
SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXKEY9"


@pytest.fixture(autouse=True)
def no_provider_keys(monkeypatch):
    for record in KNOWN.values():
        for variable in (record.key_env, record.base_url_env):
            if variable:
                monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(APP, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_the_repositorys_config_is_ok():
    code, output = run("--config", str(ROOT / "config.yaml"))
    assert code == 0
    assert "OK" in output
    assert "models.smart: not served" in output


def test_every_problem_is_a_line_and_the_exit_code_is_1(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("server: {prot: 1}\nmodels: {a: {targets: [{pool: b}]}}\n")
    code, output = run("--config", str(path))
    assert code == 1
    assert 'config.yaml:1: server.prot: unknown key; did you mean "port"?' in output
    assert 'config.yaml:2: models.a.targets[0].pool: there is no pool "b"' in output
    assert "2 problems" in output
    assert "Traceback" not in output


def test_a_missing_file_is_one_line(tmp_path):
    code, output = run("--config", str(tmp_path / "none.yaml"))
    assert code == 1
    assert "none.yaml: there is no such file (--config names another)" in output


def test_errors_are_also_there_for_programs(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("server: {prot: 1}\n")
    code, output = run("--config", str(path), "--json")
    assert code == 1
    assert json.loads(output) == {
        "ok": False,
        "errors": ['config.yaml:1: server.prot: unknown key; did you mean "port"?'],
    }


def test_each_target_is_shown_with_what_is_known_of_its_price(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    path = tmp_path / "config.yaml"
    path.write_text(
        """
keys: [{name: ci, key: "${OPENAI_API_KEY}"}]
pools: {own: {endpoints: ["http://e:1/v1"]}}
models:
  smart: {targets: [{provider: openai, model: gpt-5}, {provider: mistral, model: m}], aliases: [clever]}
  own: {targets: [{pool: own}]}
"""
    )
    code, output = run("--config", str(path), "--json")
    assert code == 0
    found = json.loads(output)
    assert found["models"] == [
        {
            "name": "smart",
            "aliases": ["clever"],
            "targets": [
                {
                    "at": "openai",
                    "model": "gpt-5",
                    "price": "known",
                    "usd_per_million_tokens": {"input": "1.25", "cached_input": "0.125", "output": "10.00"},
                    "off": None,
                },
                {
                    "at": "mistral",
                    "model": "m",
                    "price": None,
                    "usd_per_million_tokens": None,
                    "off": "mistral: no key, set MISTRAL_API_KEY",
                },
            ],
        },
        {
            "name": "own",
            "aliases": [],
            "targets": [
                {
                    "at": "own",
                    "model": "own",
                    "price": "unknown",
                    "usd_per_million_tokens": None,
                    "off": None,
                }
            ],
        },
    ]
    assert (found["providers"], found["pools"]) == (["openai"], ["own"])
    assert found["keys"] == {"caller": ["ci"], "operator": []}
    text = run("--config", str(path))[1]
    assert "$1.25 in, $0.125 cached, $10.00 out" in text
    assert "off (mistral: no key, set MISTRAL_API_KEY)" in text
    for form in ((), ("--json",)):
        assert SECRET not in run("--config", str(path), *form)[1]


def test_the_schema_is_printed_as_json():
    code, output = run("--schema")
    assert code == 0
    assert json.loads(output)["properties"]["server"]
