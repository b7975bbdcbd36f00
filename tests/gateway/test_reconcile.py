"""Counters against the ledger, with real stores of both."""

import asyncio
import time

import msgspec
import pytest

from gateway.limits_config import LimitConfig
from gateway.reconcile import Difference, compare, correct, ledger_spend, names_of, refill, settled
from gateway.stores import ledger_table
from gateway.stores.limit_sqlite import SqliteLimitStore
from gateway.stores.sqlite import DATABASE_NAME, open_database
from policies.limits.messages import Update
from tests.support.ledger_rows import a_row

NOW_US = int(time.time() * 1e6)


def limit(scope: str, **written):
    return LimitConfig(scope=scope, **{"per": "ever", **written}).limit()


@pytest.fixture
def connection(tmp_path):
    connection = open_database(tmp_path / DATABASE_NAME)
    yield connection
    connection.close()


@pytest.fixture
def rows(connection):
    count = 0

    def add(**fields) -> None:
        nonlocal count
        count += 1
        fields = {"request_id": f"req_{count}", "received_time_us": NOW_US - 10_000_000, **fields}
        ledger_table.insert(connection, [msgspec.structs.replace(a_row(), **fields)])

    return add


def spend(connection, *limits, canonical=lambda name: name, now_us=NOW_US) -> dict[str, int]:
    found = ledger_spend(connection, limits, now_us, canonical)
    return {one.counter.key: sum(one.spent.values()) for one in found}


def test_each_level_is_summed_by_its_own_column(connection, rows):
    rows(
        key_id="k1", team="a", organisation="acme", end_user="acme/ada", tags='["x","x","y"]', cost_nanousd=1
    )
    rows(key_id="k1", team="a", organisation="acme", end_user="acme/bob", tags='["x"]', cost_nanousd=10)
    rows(key_id="k2", team="b", organisation="acme", requested_model="other", cost_nanousd=100)
    levels = ("org", "team", "key", "user", "tag", "model")
    assert spend(connection, *(limit(f"{level}:*", usd=1) for level in levels)) == {
        "org/acme/money-total": 111,
        "team/a/money-total": 11,
        "team/b/money-total": 100,
        "key/k1/money-total": 11,
        "key/k2/money-total": 100,
        counter_key("user", "acme/ada"): 1,
        counter_key("user", "acme/bob"): 10,
        "tag/x/money-total": 11,
        "tag/y/money-total": 1,
        "model/demo/money-total": 11,
        "model/other/money-total": 100,
    }


def counter_key(level: str, member: str) -> str:
    return limit(f"{level}:*", usd=1).counter(member, NOW_US).key


def test_a_named_member_is_there_without_rows_and_a_key_by_its_name(connection, rows):
    rows(key_id="k1", key_name="ci", cost_nanousd=5)
    assert spend(connection, limit("team:none", usd=1), limit("key:ci", usd=1)) == {
        "team/none/money-total": 0,
        "key/k1/money-total": 5,
    }


def test_only_the_models_of_a_limit_count_under_their_public_names(connection, rows):
    for model in ("gpt-5", "gpt-alias", "claude"):
        rows(key_id="k1", requested_model=model, cost_nanousd=1)
    canonical = names_of({"gpt-alias": "gpt-5"})
    only_gpt = limit("key:*", usd=1, models=["gpt-5"])
    assert spend(connection, only_gpt, limit("model:gpt-5", usd=1), canonical=canonical) == {
        "key/k1/money-total": 2,
        "model/gpt-5/money-total": 2,
    }


def test_what_counts_of_a_row_is_what_the_policy_settles(connection, rows):
    rows(key_id="k1", input_tokens=100, cache_read_tokens=15, output_tokens=7)
    rows(key_id="k1", input_tokens=None, cache_read_tokens=None, output_tokens=None, cost_nanousd=0)
    rows(key_id="k1", ended="denied", attempts=0, cost_nanousd=0)
    rows(key_id="k1", ended="interrupted", cost_nanousd=None, input_tokens=None)
    assert spend(
        connection,
        limit("key:*", requests=1),
        limit("key:*", tokens=1, cached_weight=0.5),
        limit("key:*", input_tokens=1),
        limit("key:*", output_tokens=1),
    ) == {
        "key/k1/requests-total": 2,
        "key/k1/tokens-total": 100 + 15 - 7 + 7,  # half of 15, rounded down, is taken off
        "key/k1/input-tokens-total": 115,
        "key/k1/output-tokens-total": 7,
    }


def test_only_the_current_period_counts(connection, rows):
    day = limit("key:*", usd=1, per="day")
    start_us, end_us, _ = day.counter("k1", NOW_US).periods
    for at_us in (start_us - 1, start_us, end_us - 1, end_us):
        rows(key_id="k1", received_time_us=at_us, cost_nanousd=1)
    assert spend(connection, day) == {"key/k1/money-day": 2}


async def test_what_the_store_has_lost_is_posted_and_nothing_twice(tmp_path, connection, rows):
    rows(key_id="k1", cost_nanousd=123)
    rows(key_id="k2", cost_nanousd=7)
    limits = [limit("key:*", usd=1), limit("key:*", usd=1, per="month", name="m")]
    store = SqliteLimitStore(tmp_path)

    async def look() -> list[Difference]:
        return await compare(store, ledger_spend(connection, limits, NOW_US, lambda name: name))

    try:
        assert sorted(one.missing for one in await look()) == [7, 7, 123, 123]
        await correct(store, await look())
        assert [one.missing for one in await look()] == [0, 0, 0, 0]
        counter = limits[0].counter("k1", NOW_US)
        await store.update(Update("w", 1, 10_000_000, (counter,), posts=((0, 0, 50),)))
        assert [one.missing for one in await look() if one.missing] == [-50]
        await correct(store, await look())
        assert not [one for one in await look() if one.missing]
    finally:
        await store.close()


async def test_a_window_the_store_has_forgotten_is_filled_once(tmp_path, connection, rows):
    for ago_s in (10, 600, 4000):
        rows(key_id="k1", received_time_us=NOW_US - ago_s * 1_000_000, duration_us=0, cost_nanousd=1)
    window = limit("key:*", usd=1, per="1h")
    store = SqliteLimitStore(tmp_path)
    try:
        found = ledger_spend(connection, [window], NOW_US, lambda name: name)
        assert len(await refill(store, found)) == 1
        assert await refill(store, found) == []
        _, (reading,) = await store.read([window.counter("k1", NOW_US)])
        assert reading.spent == 2
    finally:
        await store.close()


async def test_a_difference_counts_only_when_it_stays(connection, rows):
    rows(key_id="k1", cost_nanousd=1)
    (one,) = ledger_spend(connection, [limit("key:*", usd=1)], NOW_US, lambda name: name)

    def looks(*missing: int):
        left = list(missing)

        async def look() -> list[Difference]:
            return [Difference(one.limit, one.member, one.counter, 0, left.pop(0))]

        return look

    async def at_once(_: float) -> None:
        await asyncio.sleep(0)

    async def kept(*missing: int) -> list[int]:
        return [each.missing for each in await settled(looks(*missing), len(missing), at_once)]

    assert await kept(5, 0, 9) == []
    assert await kept(5, -5, 9) == []
    assert await kept(9, 5, 7) == [5]
    assert await kept(-9, -5, -7) == [-5]
    assert await kept(0, 5, 5) == []
