"""Teams and limits in force: which wins, and how soon a change is known."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.keys import DeclaredKey, Keyring, load_pepper
from gateway.limits_config import LimitConfig, TeamConfig
from gateway.stores import tenant_table
from gateway.stores.sqlite import DATABASE_NAME, open_database
from gateway.stores.tenant_table import RaisedLimit, StoredLimit, TeamRecord
from gateway.tenants import Declared, Stored, Team, TenantsWatch, merged_limits, merged_teams, narrowed
from policies.access import may_use
from policies.exchange import Caller


def declared(scope: str, usd: int, **more):
    return LimitConfig(scope=scope, usd=usd, per="month", **more).limit()


def stored_limit(scope: str, usd: int) -> StoredLimit:
    spec = {"scope": scope, "usd": usd, "per": "month"}
    return StoredLimit(scope, "money-month", json.dumps(spec))


def amounts(limits) -> dict[str, int]:
    return {f"{one.limit.scope.level}:{one.limit.scope.name}": one.limit.amount // 10**9 for one in limits}


def test_a_limit_in_the_database_replaces_the_declared_one_of_its_scope_and_name():
    found = merged_limits(
        [declared("team:a", 10), declared("team:b", 20)],
        Stored([], [stored_limit("team:a", 5), stored_limit("team:c", 7)], []),
    )
    assert amounts(found) == {"team:a": 5, "team:b": 20, "team:c": 7}
    assert [one.source for one in found] == ["database", "config", "database"]


def test_a_raised_limit_is_another_amount_of_whichever_limit_holds():
    raised = [
        RaisedLimit("team:a", "money-month", 99 * 10**9, 2000),
        RaisedLimit("team:z", "nothing", 1, 2000),
    ]
    (found,) = merged_limits([declared("team:a", 10)], Stored([], [stored_limit("team:a", 5)], raised))
    assert (found.limit.amount, found.usual_amount, found.until_time) == (99 * 10**9, 5 * 10**9, 2000)


def test_raising_a_limit_of_everybody_for_one_makes_it_a_limit_of_its_own():
    raised = [RaisedLimit("key:k1", "money-month", 99 * 10**9, 2000)]
    found = merged_limits([declared("key:*", 10)], Stored([], [], raised))
    assert amounts(found) == {"key:*": 10, "key:k1": 99}


def test_a_limit_nobody_can_read_is_left_out_and_logged(caplog):
    assert (
        merged_limits([], Stored([], [StoredLimit("team:a", "x", '{"scope": "team:a", "furlongs": 1}')], []))
        == []
    )
    assert "cannot be read" in caplog.text


def test_of_a_team_each_setting_of_the_database_wins():
    teams = merged_teams(
        {"a": TeamConfig(organisation="acme", models=["m1"], blocked=True), "b": TeamConfig()},
        [TeamRecord("a", models=("*",)), TeamRecord("b", "corp", ("m2",), True), TeamRecord("c")],
    )
    assert teams["a"] == Team("a", "acme", None, True)
    assert teams["b"] == Team("b", "corp", frozenset({"m2"}), True)
    assert teams["c"] == Team("c")


NAMES = st.frozensets(st.text("ab", max_size=3).flatmap(lambda t: st.sampled_from([t, t + "*"])), max_size=4)


@given(st.none() | NAMES, st.none() | NAMES, st.text("ab", min_size=1, max_size=4))
def test_narrowed_lists_allow_what_both_allow(own, teams, model):
    both = may_use(Caller("k", "k", models=own), model) and may_use(Caller("k", "k", models=teams), model)
    assert may_use(Caller("k", "k", models=narrowed(own, teams)), model) == both


class Seen:
    def __init__(self) -> None:
        self.tenants = []
        self.changed = threading.Event()

    def __call__(self, tenants) -> None:
        self.tenants.append(tenants)
        self.changed.set()

    def wait(self):
        assert self.changed.wait(10)
        self.changed.clear()
        return self.tenants[-1]


@pytest.fixture
def connection(tmp_path):
    connection = open_database(tmp_path / DATABASE_NAME)
    yield connection
    connection.close()


def test_a_change_in_the_database_is_followed_within_seconds(tmp_path, connection):
    seen = Seen()
    watch = TenantsWatch(tmp_path, Declared({}, (declared("team:a", 10),)), seen)
    try:
        assert [limit.amount for limit in seen.wait().limits] == [10 * 10**9]
        tenant_table.put_limit(connection, stored_limit("team:a", 3))
        assert [limit.amount for limit in seen.wait().limits] == [3 * 10**9]
        tenant_table.delete_limit(connection, "team:a", "money-month")
        assert [limit.amount for limit in seen.wait().limits] == [10 * 10**9]
        watch.declare(Declared({}, ()))
        assert seen.wait().limits == ()
    finally:
        watch.close()


def test_what_was_raised_ends_with_its_time(tmp_path, connection):
    now = [1000.0]
    seen = Seen()
    tenant_table.put_raised(connection, RaisedLimit("team:a", "money-month", 7, 1010))
    watch = TenantsWatch(tmp_path, Declared({}, (declared("team:a", 10),)), seen, clock=lambda: now[0])
    try:
        assert [limit.amount for limit in seen.wait().limits] == [7]
        now[0] = 1010.0
        assert [limit.amount for limit in seen.wait().limits] == [10 * 10**9]
    finally:
        watch.close()


def test_a_teams_block_models_and_organisation_reach_its_keys(tmp_path):
    key = DeclaredKey("app", "sk-test-6f1c2a9b8d7e4f30", team="a", models=frozenset({"m*", "n"}))
    keyring = Keyring(tmp_path, load_pepper(tmp_path), [key])
    try:
        assert keyring.find(key.value.encode()).organisation == ""
        keyring.use_teams({"a": Team("a", "acme", frozenset({"m1", "n*"}))})
        caller = keyring.find(key.value.encode())
        assert (caller.organisation, caller.models) == ("acme", {"m1", "n"})
        keyring.use_teams({"a": Team("a", is_blocked=True)})
        assert keyring.find(key.value.encode()) == "blocked"
        keyring.use_teams({})
        assert keyring.find(key.value.encode()).models == key.models
    finally:
        keyring.close()
