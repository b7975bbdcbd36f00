import asyncio
import os
import signal
import time

import pytest

from backends.config import PoolConfig
from gateway.config import Config
from gateway.engines import Engines
from local_engine.config import SimulatorConfig
from local_engine.processes import StartError, answers_ok


def a_config(**simulator) -> Config:
    pools = {
        "demo": PoolConfig(simulator=SimulatorConfig(**{"time_scale": 0, **simulator})),
        "far": PoolConfig(endpoints=("http://10.0.0.1:8000/v1",)),
        "off": PoolConfig(enabled=False, simulator=SimulatorConfig()),
    }
    return Config(pools=pools)


async def test_each_replica_runs_and_its_pool_becomes_one_of_addresses():
    engines = Engines(lambda name: None)
    config = a_config(replicas=2, seed=5)
    await engines.start(config)
    try:
        assert [child.name for child in engines.children()] == ["demo/0", "demo/1"]
        placed = Config.from_json(engines.placed(config).to_json())
        addresses = placed.pools["demo"].endpoints
        assert len(set(addresses)) == 2
        assert placed.enabled_pools()["demo"].provider.docs == config.enabled_pools()["demo"].provider.docs
        assert placed.pools["demo"].simulator is None
        assert placed.pools["far"] == config.pools["far"]
        for address in addresses:
            port = int(address.removesuffix("/v1").rpartition(":")[2])
            assert await answers_ok("127.0.0.1", port, "/v1/models")
    finally:
        await engines.stop()


async def test_an_engine_that_dies_is_told_and_comes_back():
    died: list[str] = []
    engines = Engines(died.append)
    await engines.start(a_config())
    try:
        (child,) = engines.children()
        first = child.pid
        os.kill(first, signal.SIGKILL)
        deadline_at = time.monotonic() + 30
        while child.pid == first:
            assert time.monotonic() < deadline_at
            await asyncio.sleep(0.02)
        assert died == ["demo/0"]
    finally:
        await engines.stop()


async def test_one_engine_that_cannot_start_ends_them_all(monkeypatch):
    monkeypatch.setattr("gateway.engines._command", lambda *_: ["/bin/false"])
    engines = Engines(lambda name: None)
    with pytest.raises(StartError, match="demo/0 ended with code 1"):
        await engines.start(a_config())
