"""What `headgate explain` says of limits, from where the store stands."""

import asyncio
import json
import time

import pytest
import yaml
from typer.testing import CliRunner

from backends.registry import KNOWN
from gateway.commands.app import app
from gateway.config import load
from gateway.stores.limit_sqlite import SqliteLimitStore
from policies.limits.messages import Update

CONFIG = {
    "storage": {"directory": "data"},
    "keys": [{"name": "ci", "key": "caller-key-4fd8a1c6e2", "team": "web", "tags": ["batch"]}],
    "teams": {"web": {"organisation": "acme", "models": ["own"]}},
    "pools": {"own": {"endpoints": ["http://a.test:1/v1"]}},
    "models": {
        "own": {"targets": [{"pool": "own"}], "price": {"input": 1, "output": 10}},
        "other": {"targets": [{"pool": "own"}], "price": {"input": 1, "output": 10}},
    },
    "limits": {
        "rules": [
            {"scope": "org:acme", "usd": 10, "per": "month"},
            {"scope": "team:*", "requests": 60, "per": "1m"},
            {"scope": "tag:batch", "usd": "0.001", "per": "day", "soft": True},
            {"scope": "user:*", "tokens": 2000, "per": "day"},
            {"scope": "key:somebody", "usd": 0, "per": "day"},
        ],
        "end_users": {"fields": ["user"]},
    },
}


@pytest.fixture
def told(tmp_path, monkeypatch):
    for record in KNOWN.values():
        for variable in filter(None, (record.key_env, record.base_url_env)):
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))

    def tell(*arguments: str, as_json: bool = True):
        options = ["explain", "--config", str(path), "--model", "own", "--key", "ci", *arguments]
        result = CliRunner().invoke(app, [*options, "--json"] if as_json else options)
        assert result.exit_code == 0, result.output
        return json.loads(result.output) if as_json else result.output

    tell.path = path
    return tell


def spend(path, rule: int, member: str, units: int) -> None:
    config = load(path, {})
    counter = config.declared().limits[rule].counter(member, int(time.time() * 1e6))
    store = SqliteLimitStore(config.storage.directory)
    store.apply(Update("w1", 1, 10_000_000, (counter,), posts=((0, 0, units),)))
    asyncio.run(store.close())


def test_the_limits_that_hold_are_shown_with_what_the_request_would_reserve(told):
    admit = told("--max-tokens", "100")["admit"]
    assert admit["denied"] is None
    limits = {one["scope"]: one for one in admit["limits"]}
    assert set(limits) == {"org:acme", "team:web", "tag:batch"}
    assert limits["org:acme"]["asks"] == "$0.001276"  # 276 tokens of input and 100 of output
    assert (limits["team:web"]["asks"], limits["team:web"]["spent"]) == ("1 requests", "0 requests")


def test_nothing_is_made_by_looking(told, tmp_path):
    told()
    assert not (tmp_path / "data").exists()


def test_what_is_spent_refuses_and_says_why(told):
    spend(told.path, 0, "acme", 9_999_500_000)
    admit = told("--max-tokens", "100")["admit"]
    assert (admit["denied"], admit["status"]) == ("budget_exceeded", 429)
    assert "money-month` of your organisation" in admit["message"]
    assert {one["scope"]: one["verdict"] for one in admit["limits"]} == {
        "org:acme": "refuses",
        "team:web": "allows",
        "tag:batch": "allows",
    }
    text = told("--max-tokens", "100", as_json=False)
    assert "$9.9995" in text
    assert "429 budget_exceeded" in text


def test_a_soft_limit_warns(told):
    spend(told.path, 2, "batch", 2_000_000)
    admit = told()["admit"]
    assert admit["denied"] is None
    assert [one["verdict"] for one in admit["limits"] if one["scope"] == "tag:batch"] == ["warns"]


def test_an_end_user_has_limits_of_their_own(told):
    admit = told("--user", "ada", "--max-tokens", "5000")["admit"]
    assert admit["denied"] == "rate_limit_exceeded"
    (user,) = (one for one in admit["limits"] if one["scope"] == "user:acme/ada")
    assert (user["verdict"], user["amount"]) == ("refuses", "2,000 tokens")


def test_a_teams_models_and_block_hold(told):
    assert told("--model", "other")["admit"]["denied"] == "model_not_allowed"
    options = ["--config", str(told.path)]
    assert CliRunner().invoke(app, ["teams", "block", "web", *options]).exit_code == 0
    who = told()["identify"]
    assert (who["denied"], who["status"], who["organisation"]) == ("key_blocked", 403, "acme")
