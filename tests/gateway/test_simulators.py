import asyncio
import os
import signal
import time

import pytest

from backends.config import PoolConfig
from gateway.config import Config
from gateway.placed import PlacedConfig
from gateway.simulators import Simulators
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
    simulators = Simulators(lambda name: None)
    config = a_config(replicas=2, seed=5)
    await simulators.start(config)
    try:
        assert [child.name for child in simulators.children()] == ["demo/0", "demo/1"]
        placed = PlacedConfig.from_json(PlacedConfig.of(config, simulators.placed()).to_json())
        pools = placed.enabled_pools()
        assert [member.name for member in pools["demo"].all_members()] == ["demo/0", "demo/1"]
        addresses = [member.base_url for member in pools["demo"].all_members()]
        assert len(set(addresses)) == 2
        assert pools["demo"].provider == config.enabled_pools()["demo"].provider
        assert pools["far"] == config.enabled_pools()["far"]
        for address in addresses:
            port = int(address.removesuffix("/v1").rpartition(":")[2])
            assert await answers_ok("127.0.0.1", port, "/v1/models")
    finally:
        await simulators.stop()


async def test_an_engine_that_dies_is_told_and_comes_back():
    died: list[str] = []
    simulators = Simulators(died.append)
    await simulators.start(a_config())
    try:
        (child,) = simulators.children()
        first = child.pid
        os.kill(first, signal.SIGKILL)
        deadline_at = time.monotonic() + 30
        while child.pid == first:
            assert time.monotonic() < deadline_at
            await asyncio.sleep(0.02)
        assert died == ["demo/0"]
    finally:
        await simulators.stop()


async def test_one_engine_that_cannot_start_ends_them_all(monkeypatch):
    monkeypatch.setattr("gateway.simulators._command", lambda *_: ["/bin/false"])
    simulators = Simulators(lambda name: None)
    with pytest.raises(StartError, match="demo/0 ended with code 1"):
        await simulators.start(a_config())
