import json
import os
import time

import pytest
from typer.testing import CliRunner

from gateway.commands.keys import app
from gateway.keys import Keyring, load_pepper
from gateway.stores.sqlite import DATABASE_NAME, database
from policies.exchange import Caller


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HEADGATE_DATA", str(tmp_path))
    monkeypatch.delenv("HEADGATE_PEPPER", raising=False)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def find(tmp_path):
    """Looks a key up as a gateway started now would."""

    def found(key: str):
        keyring = Keyring(tmp_path, load_pepper(tmp_path, os.environ.get("HEADGATE_PEPPER")))
        try:
            return keyring.find(key.encode())
        finally:
            keyring.close()

    return found


def test_a_key_is_printed_alone_on_standard_output_and_works(run, find) -> None:
    result = run(
        "create", "ci", "--team", "platform", "--model", "demo", "--model", "gpt-*", "--tag", "nightly"
    )
    assert result.exit_code == 0
    key = result.stdout.strip()
    assert key.startswith("sk-hg-")
    assert "not shown again" in result.stderr
    assert key not in result.stderr
    caller = find(key)
    assert isinstance(caller, Caller)
    assert (caller.name, caller.team, caller.models) == ("ci", "platform", {"demo", "gpt-*"})
    assert caller.tags == ("nightly",)
    assert 89 * 86_400 < caller.expires_time - time.time() <= 90 * 86_400


def test_programs_get_json(run) -> None:
    made = json.loads(run("create", "ci", "--expires", "never", "--json").output)
    assert made["key"].startswith("sk-hg-" + made["id"])
    assert (made["name"], made["expires"], made["models"], made["state"]) == ("ci", None, None, "active")
    made.pop("key")
    assert json.loads(run("list", "--json").output) == [made]
    assert json.loads(run("show", made["id"], "--json").output) == made
    assert json.loads(run("show", "ci", "--json").output) == made


def test_an_operators_key_is_another_kind(run, find) -> None:
    key = run("create", "root", "--operator").stdout.strip()
    assert key.startswith("op-hg-")
    assert find(key) == "unknown"
    assert "operator" in run("list").output


def test_a_revoked_key_is_refused_and_leaves_the_list(run, find) -> None:
    key = run("create", "ci").stdout.strip()
    result = run("revoke", "ci")
    assert result.exit_code == 0
    assert "Revoked" in result.output
    assert find(key) == "revoked"
    assert "ci" not in run("list").output
    assert "revoked" in run("list", "--all").output
    assert "revoked" in run("show", "ci").output


def test_a_rotated_key_keeps_its_id_and_the_old_one_works_for_the_grace(run, find) -> None:
    old = json.loads(run("create", "ci", "--expires", "never", "--json").output)
    new = json.loads(run("rotate", "ci", "--json").output)
    assert new["id"] == old["id"]
    assert new["expires"] is None
    assert isinstance(find(old["key"]), Caller)
    assert isinstance(find(new["key"]), Caller)
    newest = run("rotate", old["id"], "--grace", "0h", "--expires", "30d").stdout.strip()
    assert find(new["key"]) == "expired"
    caller = find(newest)
    assert isinstance(caller, Caller)
    assert caller.expires_time is not None


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["create", ""], 1, "needs a name"),
        (["create", "ci", "--expires", "soon"], 2, "is no expiry"),
        (["show", "nobody"], 1, "There is no key nobody"),
        (["revoke", "nobody"], 1, "There is no key nobody"),
        (["rotate", "nobody"], 1, "There is no key nobody"),
        (["create", "taken"], 1, "already: rotate or revoke"),
        (["rotate", "both"], 1, "Several keys are named so"),
        (["rotate", "ended"], 1, "is revoked"),
        (["rotate", "taken", "--grace", "never"], 1, "must end some time"),
    ],
)
def test_what_cannot_be_done_is_explained(run, arguments, code, sentence) -> None:
    run("create", "taken")
    run("create", "both")
    run("create", "both", "--operator")
    run("create", "ended")
    run("revoke", "ended")
    result = run(*arguments)
    assert result.exit_code == code
    assert sentence in result.output


def test_names_are_shown_as_they_are(run) -> None:
    run("create", "[red]odd[/]", "--team", "[x]")
    assert "[red]odd[/]" in run("list").output
    assert "[red]odd[/]" in run("show", "[red]odd[/]").output


def test_a_pepper_from_the_environment_is_used_and_not_written(run, find, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HEADGATE_PEPPER", "x" * 32)
    key = run("create", "ci").stdout.strip()
    assert isinstance(find(key), Caller)
    assert not (tmp_path / "pepper").exists()
    monkeypatch.setenv("HEADGATE_PEPPER", "short")
    result = run("create", "other")
    assert result.exit_code == 1
    assert "at least 32" in result.output


def test_keys_can_be_made_while_a_gateway_holds_the_database_open(run, tmp_path) -> None:
    with database(tmp_path / DATABASE_NAME) as connection:
        connection.execute("SELECT * FROM ledger").fetchall()
        assert run("create", "ci").exit_code == 0


def test_listing_without_a_database_says_so(run) -> None:
    result = run("list")
    assert result.exit_code == 1
    assert "start the gateway once" in result.output
