"""The parent's check of budgets: what is missing is posted, what is too much is told."""

import asyncio
import time

import msgspec
import pytest
import yaml

from gateway.config import load
from gateway.limits_config import LimitConfig
from gateway.self_check import SelfCheck
from gateway.stores import ledger_table
from gateway.stores.limit_sqlite import SqliteLimitStore
from gateway.stores.sqlite import DATABASE_NAME, database
from policies.limits.messages import Update
from tests.support.ledger_rows import a_row

RULE = {"scope": "key:*", "usd": 1, "per": "month"}
LIMIT = LimitConfig(**RULE).limit()


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"storage": {"directory": "data"}, "limits": {"rules": [RULE], "check_at": "04:00"}})
    )
    loaded = load(tmp_path / "config.yaml", {})
    with database(tmp_path / "data" / DATABASE_NAME) as connection:
        row = msgspec.structs.replace(
            a_row(), key_id="k1", cost_nanousd=1234, received_time_us=int(time.time() * 1e6)
        )
        ledger_table.insert(connection, [row])
    return loaded


async def spent(config) -> int:
    store = SqliteLimitStore(config.storage.directory)
    _, (reading,) = await store.read([LIMIT.counter("k1", int(time.time() * 1e6))])
    await store.close()
    return reading.spent


async def post(config, units: int) -> None:
    store = SqliteLimitStore(config.storage.directory)
    counter = LIMIT.counter("k1", int(time.time() * 1e6))
    await store.update(Update("w1", 1, 10_000_000, (counter,), posts=((0, 0, units),)))
    await store.close()


@pytest.fixture
def check(config, monkeypatch):
    monkeypatch.setattr("gateway.reconcile._BETWEEN_LOOKS_S", 0.0)
    monkeypatch.setattr("gateway.self_check._LOOKS", 2)
    return SelfCheck(lambda: config)


async def test_what_a_budget_is_missing_is_posted(check, config, caplog):
    await post(config, 1000)
    assert await check.check() == []
    assert await spent(config) == 1234
    assert (check.drift_nanousd, check.corrections) == (0, 1)
    assert "brought up to it" in caplog.text
    await check.check()
    assert (await spent(config), check.corrections) == (1234, 1)


async def test_what_a_budget_has_too_much_is_told_and_left(check, config, caplog):
    await post(config, 2000)
    (left,) = await check.check()
    assert left.missing == -766
    assert (check.drift_nanousd, await spent(config)) == (766, 2000)
    assert "more than the ledger" in caplog.text


async def test_without_limits_no_store_is_opened(tmp_path):
    (tmp_path / "config.yaml").write_text("storage: {directory: data}\n")
    config = load(tmp_path / "config.yaml", {})
    with database(tmp_path / "data" / DATABASE_NAME):
        pass
    check = SelfCheck(lambda: config)
    assert await check.check() == []
    assert check.checked_time > 0
    assert not (tmp_path / "data/limits.db").exists()


@pytest.mark.parametrize("turns", range(8))
async def test_whenever_it_is_told_to_end_it_ends(config, turns):
    """Also in the very turn in which it finds reason to check, as it does at the start."""
    run = asyncio.create_task(SelfCheck(lambda: config).run())
    for _ in range(turns):
        await asyncio.sleep(0)
    run.cancel()
    await asyncio.wait({run}, timeout=30.0)
    assert run.cancelled()
