"""Two gateways that share a Redis, one upstream behind both, and what became of the money."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.stores.limit_redis import RedisLimitStore
from gateway.stores.redis_connection import RedisConnection
from policies.limits.limit import Limit
from policies.limits.messages import Reading
from tests.support import limit_burst
from tests.support.gateway_process import Gateway
from tests.support.redis_server import RedisServer
from tests.support.upstream_thread import BlockingUpstream

NAMES = ("a", "b")


def node(
    directory: Path, name: str, redis: RedisServer, upstream: BlockingUpstream, **settings: Any
) -> Gateway:
    """One of them, not started. `settings` are the gateway's, or the limits' under `limits`.

    Its Redis has long to answer: where nothing happens to Redis, a busy machine should not look as if.
    """
    config = limit_burst.budget_config(upstream.url, **settings.pop("limits", {}))
    shared = {"url": redis.url, "node": name, "timeout_ms": settings.pop("timeout_ms", 5000)}
    storage = {"directory": str(directory / name / "data"), "redis": shared}
    (directory / name).mkdir(exist_ok=True)
    return Gateway(directory / name, **{"workers": 2, "storage": storage, **config, **settings})


@asynccontextmanager
async def two_nodes(
    directory: Path, redis: RedisServer, upstream: BlockingUpstream, **settings: Any
) -> AsyncIterator[tuple[Gateway, Gateway]]:
    pair = tuple(node(directory, name, redis, upstream, **dict(settings)) for name in NAMES)
    try:
        await asyncio.gather(*(asyncio.to_thread(gateway.start) for gateway in pair))
        yield pair
    finally:
        for gateway in pair:
            await asyncio.to_thread(gateway.kill if settings.get("module") else gateway.stop)


async def readings(redis: RedisServer, *limits: tuple[Limit, str]) -> list[Reading]:
    """Where limits and their members stand in Redis."""
    store = RedisLimitStore(RedisConnection(redis.url, "headgate", timeout_s=5.0))
    try:
        return (
            await store.read([limit.counter(member, time.time_ns() // 1000) for limit, member in limits])
        )[1]
    finally:
        await store.close()


def costs(gateway: Gateway) -> dict[str, int | None]:
    """What a node's ledger has, its own rows and the others'."""
    return {row["request_id"]: row["cost_nanousd"] for row in gateway.rows()}


async def agreement(
    redis: RedisServer, pair: Sequence[Gateway], limit: tuple[Limit, str], within_s: float
) -> tuple[int, Reading, list[dict[str, int | None]]]:
    """Waits until store and both ledgers say the same and nothing is held: the ledger's sum, the store, the ledgers."""
    deadline = time.monotonic() + within_s
    while True:
        ledgers = [await asyncio.to_thread(costs, gateway) for gateway in pair]
        (stands,) = await readings(redis, limit)
        spent = sum(cost or 0 for cost in ledgers[0].values())
        is_same = all(ledger == ledgers[0] for ledger in ledgers) and (stands.spent, stands.held) == (
            spent,
            0,
        )
        if is_same or time.monotonic() > deadline:
            return spent, stands, ledgers
        await asyncio.sleep(0.2)


@dataclass(slots=True)
class Answer:
    """One request as its client saw it; times are `time.perf_counter()`. Status 0: the connection broke."""

    sent_at: float
    ended_at: float
    status: int

    @property
    def lasted_s(self) -> float:
        return self.ended_at - self.sent_at


class Clients:
    """So many of them, in turn over the ports, one request after the other until `stop`."""

    def __init__(self, ports: Sequence[int], count: int) -> None:
        self.answers: list[Answer] = []
        self._is_stopping = False
        self._tasks = [asyncio.create_task(self._ask(ports[n % len(ports)])) for n in range(count)]

    async def stop(self) -> list[Answer]:
        self._is_stopping = True
        await asyncio.gather(*self._tasks)
        return self.answers

    async def _ask(self, port: int) -> None:
        while not self._is_stopping:
            sent_at = time.perf_counter()
            status = 0
            with contextlib.suppress(OSError, EOFError):
                status = (await limit_burst.burst([port], 1))[0]
            self.answers.append(Answer(sent_at, time.perf_counter(), status))
            await asyncio.sleep(0.01)


def worker_pids(gateway: Gateway) -> list[int]:
    assert gateway.process is not None
    children = Path(f"/proc/{gateway.process.pid}/task/{gateway.process.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def quantile(values: Sequence[float], share: float) -> float:
    """0 without values."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0
