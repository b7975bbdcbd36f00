"""A node's parent and its Redis: filled when it knows nothing, and whoever must know is told."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.config import Config
from gateway.limit_storage import LimitStorage, open_redis_store
from gateway.node import Node
from gateway.shared_check import SharedCheck
from gateway.stores import ledger_table
from gateway.stores.sqlite import DATABASE_NAME, database
from policies.limits.limit import Limit
from policies.limits.messages import Counter, Reading
from tests.support.ledger_rows import a_row
from tests.support.redis_server import RedisServer

COST = 250_000_000


@pytest.fixture
def server(tmp_path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


def a_config(directory: Path, url: str, node: str = "a") -> Config:
    rules = [{"scope": "team:platform", "name": "budget", "usd": 1, "per": "ever"}]
    storage = {"directory": str(directory / node), "redis": {"url": url, "node": node, "timeout_ms": 5000}}
    return Config.model_validate({"storage": storage, "limits": {"rules": rules}})


def spend(config: Config, *request_ids: str) -> None:
    with database(config.storage.directory / DATABASE_NAME) as connection:
        ledger_table.insert(connection, [a_row(request_id, cost_nanousd=COST) for request_id in request_ids])


def budget(config: Config) -> Counter:
    (limit,) = config.declared().limits
    assert isinstance(limit, Limit)
    return limit.counter("platform", 1)


async def stands(config: Config) -> Reading:
    assert config.storage.redis is not None
    store = open_redis_store(config.storage.redis, timeout_s=10.0)
    try:
        return (await store.read((budget(config),)))[1][0]
    finally:
        await store.close()


async def until(condition, within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.02)


async def test_an_empty_redis_learns_from_the_ledger_what_was_spent(tmp_path, server) -> None:
    config, reasons = a_config(tmp_path, server.url), []
    spend(config, "r1", "r2")
    node = Node(lambda: config, lambda: reasons.append(1))
    await node.start()
    assert (await stands(config)).spent == 2 * COST
    assert reasons
    assert node.details() == {"node": "a", "redis": "ok"}
    running = asyncio.create_task(node.run())
    spend(config, "r3")
    await asyncio.to_thread(server.command, "FLUSHALL")
    await until(lambda: len(reasons) == 2)
    assert (await stands(config)).spent == 3 * COST
    assert node.snapshot()["headgate_redis_fills_total"].samples == [([], 2)]
    running.cancel()
    await asyncio.wait({running})


async def test_a_node_starts_without_its_redis_and_finds_it_later(tmp_path, server) -> None:
    server.kill()
    config, reasons = a_config(tmp_path, server.url), []
    spend(config, "r1")
    node = Node(lambda: config, lambda: reasons.append(1))
    await node.start()
    assert node.details()["redis"] == "away"
    running = asyncio.create_task(node.run())
    await asyncio.to_thread(server.start)
    await until(lambda: len(reasons) >= 2)  # filled, and back
    assert (await stands(config)).spent == COST
    await until(lambda: node.details()["redis"] == "ok")
    running.cancel()
    await asyncio.wait({running})


@pytest.mark.parametrize("wrong", [-COST, COST])
async def test_a_counter_that_is_wrong_for_good_becomes_what_the_ledger_says(tmp_path, server, wrong) -> None:
    config = a_config(tmp_path, server.url)
    spend(config, "r1", "r2")
    assert config.storage.redis is not None
    store = open_redis_store(config.storage.redis, timeout_s=10.0)
    await store.fill([(budget(config), {0: 2 * COST + wrong})])
    check = SharedCheck(lambda: config, settled_s=0.05)
    assert await check.check() == [], "nothing stays different"
    assert (await stands(config)).spent == 2 * COST
    assert check.corrections == 1
    await store.close()


async def test_redis_is_loaded_for_limits_of_several_nodes_only(tmp_path, server) -> None:
    alone = LimitStorage(Config.model_validate({"storage": {"directory": str(tmp_path)}}).storage)
    store = alone.open()
    assert not alone.health().is_away
    await store.close()
    shared = LimitStorage(a_config(tmp_path, server.url).storage)
    store = shared.open()
    now_us, _ = await store.read(())
    assert now_us > 0
    assert "filled" in shared.health().last_error
    await store.close()
