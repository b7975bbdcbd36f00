import asyncio
import json
import time

import pytest
import yaml
from typer.testing import CliRunner

from gateway.commands.app import app
from gateway.config import load
from gateway.stores.limit_sqlite import SqliteLimitStore
from policies.limits.messages import Update

CONFIG = {
    "storage": {"directory": "data"},
    "keys": [{"name": "ci", "key": "sk-test-6f1c2a9b8d7e4f30"}],
    "teams": {"research": {"organisation": "acme", "models": ["gpt-*"]}},
    "limits": {
        "rules": [
            {"scope": "team:research", "usd": 500, "per": "month"},
            {"scope": "key:*", "requests": 60, "per": "1m"},
            {"scope": "key:ci", "usd": 1, "per": "day"},
            {"scope": "org:acme", "usd": 9000, "per": "month", "zone": "Europe/Berlin"},
        ]
    },
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HEADGATE_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.delenv("HEADGATE_DATA", raising=False)
    (tmp_path / "data").mkdir()
    runner = CliRunner()
    assert runner.invoke(app, ["keys", "create", "app-1", "--team", "research"]).exit_code == 0
    return lambda *arguments: runner.invoke(app, list(arguments))


@pytest.fixture
def limits(run):
    def listed(*scope: str) -> dict[str, dict]:
        found = json.loads(run("limits", "list", "--json", *scope).stdout)
        return {f"{one['scope']} {one['name']}": one for one in found}

    return listed


def test_limits_of_the_configuration_are_listed_as_such(limits, run):
    assert {name: one["source"] for name, one in limits().items()} == {
        "key:* requests-60s": "config",
        "key:config:ci money-day": "config",
        "org:acme money-month": "config",
        "team:research money-month": "config",
    }
    table = run("limits", "list").output
    assert "$9,000.00" in table
    assert "Europe/Berlin" in table


def test_a_limit_that_is_set_wins_until_it_is_unset(limits, run):
    told = run("limits", "set", "team:research", "--usd", "20.5", "--per", "month", "--soft")
    assert told.output == "team:research money-month: $20.50 per month, warns (from the database)\n"
    assert (limits()["team:research money-month"]["amount"], len(limits())) == ("20.5", 4)
    run(
        "limits",
        "set",
        "team:research",
        "--tokens",
        "1000",
        "--per",
        "1m",
        "--model",
        "gpt-*",
        "--cached-weight",
        "0.1",
    )
    one = limits()["team:research tokens-60s"]
    assert (one["amount"], one["models"]) == (1000, ["gpt-*"])
    back = run("limits", "unset", "team:research", "money-month")
    assert "$500.00 per month (from the config)" in back.output
    assert "no limit tokens-60s any more" in run("limits", "unset", "team:research", "tokens-60s").output


def test_a_key_is_meant_by_its_name_or_its_id(limits, run):
    key_id = json.loads(run("keys", "show", "app-1", "--json").output)["id"]
    run("limits", "set", "key:app-1", "--usd", "3", "--per", "day")
    run("limits", "set", f"key:{key_id}", "--concurrent-requests", "3")
    run("limits", "set", "key:ci", "--usd", "2", "--per", "day")
    found = limits()
    assert {f"key:{key_id} money-day", f"key:{key_id} concurrent-requests"} < set(found)
    assert found["key:config:ci money-day"]["amount"] == "2"
    assert set(limits("key:app-1")) == {
        "key:* requests-60s",
        f"key:{key_id} concurrent-requests",
        f"key:{key_id} money-day",
    }
    assert "no key nobody" in run("limits", "set", "key:nobody", "--usd", "3", "--per", "day").output


def test_a_limit_is_raised_for_a_while(limits, run):
    told = run("limits", "raise", "team:research", "money-month", "--to", "800", "--until", "24h")
    assert told.exit_code == 0, told.output
    one = limits()["team:research money-month"]
    assert (one["amount"], one["usual_amount"], one["source"]) == ("800", "500", "config")
    assert one["raised_until"].startswith(time.strftime("%Y-", time.gmtime(time.time() + 86_400)))
    assert "usually $500.00" in run("limits", "list").output
    run("limits", "raise", "team:research", "money-month", "--end")
    assert limits()["team:research money-month"]["raised_until"] is None


def test_a_limit_of_everybody_is_raised_for_one(limits, run):
    run("limits", "raise", "key:app-1", "requests-60s", "--to", "600", "--until", "1h")
    found = limits("key:app-1")
    assert [one["amount"] for one in found.values()] == [600]
    assert limits()["key:* requests-60s"]["amount"] == 60


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["set", "team:a"], "exactly one of"),
        (["set", "team:a", "--usd", "1"], "needs per"),
        (["set", "team:a", "--usd", "lots", "--per", "day"], "--usd"),
        (["set", "planet:a", "--usd", "1", "--per", "day"], "a scope is written"),
        (["set", "team:a", "--usd", "1", "--per", "day", "--zone", "Nowhere"], "no time zone"),
        (["unset", "team:a", "money-day"], "There is no limit team:a money-day"),
        (["raise", "team:a", "money-day", "--to", "3"], "There is no limit team:a money-day"),
        (["raise", "team:research", "money-month", "--to", "3", "--until", "never"], "until a time"),
        (["raise", "team:research", "money-month", "--to", "x"], "no amount"),
        (["raise", "key:*", "requests-60s", "--to", "0.5"], "no amount of requests"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(run, arguments, problem):
    result = run("limits", *arguments)
    assert result.exit_code == 1
    assert problem in result.output
    assert "Traceback" not in result.output


def test_a_team_is_made_changed_blocked_and_forgotten(run):
    def team(name: str) -> dict:
        return json.loads(run("teams", "show", name, "--json").output)

    assert run("teams", "create", "web", "--organisation", "acme", "--model", "m1").exit_code == 0
    assert {key: team("web")[key] for key in ("organisation", "models", "blocked")} == {
        "organisation": "acme",
        "models": ["m1"],
        "blocked": False,
    }
    run("teams", "change", "web", "--model", "*")
    run("teams", "block", "web")
    assert (team("web")["models"], team("web")["blocked"]) == (None, True)
    run("teams", "unblock", "web")
    assert team("web")["blocked"] is False
    assert "already" in run("teams", "create", "research").output
    assert [one["name"] for one in json.loads(run("teams", "list", "--json").output)] == ["research", "web"]
    run("teams", "forget", "web")
    assert run("teams", "show", "web").exit_code == 1


def test_what_is_said_of_a_declared_team_wins_setting_by_setting(run):
    run("teams", "change", "research", "--organisation", "corp")
    team = json.loads(run("teams", "show", "research", "--json").output)
    assert (team["organisation"], team["models"]) == ("corp", ["gpt-*"])
    assert [one["name"] for one in team["limits"]] == ["money-month"]
    run("teams", "forget", "research")
    team = json.loads(run("teams", "show", "research", "--json").output)
    assert team["organisation"] == "acme"
    assert len(team["limits"]) == 2


def test_a_key_is_changed_blocked_and_unblocked(run):
    def key() -> dict:
        return json.loads(run("keys", "show", "app-1", "--json").output)

    run("keys", "change", "app-1", "--team", "web", "--model", "m1", "--tag", "t", "--expires", "never")
    assert {name: key()[name] for name in ("team", "models", "tags", "expires")} == {
        "team": "web",
        "models": ["m1"],
        "tags": ["t"],
        "expires": None,
    }
    run("keys", "change", "app-1", "--model", "*")
    assert (key()["models"], key()["team"]) == (None, "web")
    run("keys", "block", "app-1")
    assert key()["state"] == "blocked"
    assert "blocked" in run("keys", "list").output
    run("keys", "unblock", "app-1")
    assert key()["state"] == "active"
    run("keys", "revoke", "app-1")
    assert "revoked" in run("keys", "block", "app-1").output


def test_without_a_readable_configuration_what_is_stored_is_still_shown(run, tmp_path):
    run("limits", "set", "team:a", "--usd", "1", "--per", "day")
    (tmp_path / "config.yaml").write_text("storage: {directory: data}\nkeys: 7\n")
    result = run("limits", "list")
    assert "team:a" in result.output
    assert "left out" in result.output


def test_where_a_limit_stands_is_shown(run, tmp_path):
    config = load(tmp_path / "config.yaml", {})
    (money,) = (one for one in config.declared().limits if one.scope.name == "research")
    store = SqliteLimitStore(config.storage.directory)
    counter = money.counter("research", int(time.time() * 1e6))
    store.apply(Update("w1", 1, 60_000_000, (counter,), posts=((0, 0, 125 * 10**9),), claims=((0, 10**9),)))
    asyncio.run(store.close())
    (told,) = json.loads(run("limits", "show", "team:research", "--json").stdout)
    assert (told["spent"], told["reserved"], told["amount"]) == ("125", "1", "500")
    assert "25.0 %" in run("limits", "show", "team:research").output
    assert "Name one" in run("limits", "show", "team:*").output


def test_before_the_first_start_nothing_is_spent(run, tmp_path):
    assert "0.0 %" in run("limits", "show", "team:research").output
    assert not (tmp_path / "data/limits.db").exists()
