"""Queues for tests: two processes' views of one store, and its clock."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gateway.overflow.store import QueueStore
from gateway.stores.limit_sqlite import Clocks
from gateway.stores.queue_content import Content
from gateway.stores.queue_journal import Journal
from gateway.stores.queue_node import QueueNode
from gateway.stores.queue_redis import RedisQueueStore
from gateway.stores.queue_sqlite import SqliteQueueStore
from gateway.stores.redis_connection import RedisConnection
from tests.support.queue_clock import QueueClock
from tests.support.redis_server import RedisServer

STORES = ("sqlite", "redis")


class Clock(Protocol):
    """A store's time, the test's to move."""

    def now_us(self) -> int: ...

    @property
    def clocks(self) -> Clocks: ...


class Queue(NamedTuple):
    store: QueueStore
    other: QueueStore
    clock: QueueClock

    async def close(self) -> None:
        await self.store.close()
        await self.other.close()


class Servers:
    """What several tests of a file share."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server

    async def queue(self, kind: str, directory: Path, **settings: Any) -> Queue:
        clock = QueueClock()
        if kind == "redis":
            self.server.command("FLUSHALL")
            stores = [redis_queue(self.server, directory, clock, **settings) for _ in range(2)]
            return Queue(*stores, clock)
        first = SqliteQueueStore(directory, clocks=clock.clocks, **settings)
        return Queue(first, SqliteQueueStore(directory, clocks=clock.clocks, **settings), clock)


def redis_queue(
    server: RedisServer | str, directory: Path, clock: Clock | None = None, **settings: Any
) -> RedisQueueStore:
    """A process's view; those of one `directory` are on one node. `server` may be its URL, `tag` what its keys begin with."""
    timeout_s = settings.pop("timeout_s", 10.0)
    journal = Journal(directory, clocks=None if clock is None else clock.clocks)
    grace_s = settings.pop("grace_s", 0.0)
    now_us = None if clock is None else clock.now_us
    url = server if isinstance(server, str) else server.url
    connection = RedisConnection(url, settings.pop("tag", "t"), timeout_s=timeout_s)
    node = QueueNode(connection, journal, grace_s=grace_s, now_us=now_us, **settings)
    return RedisQueueStore(node, Content())


@contextmanager
def opened(directory: Path) -> Iterator[Servers]:
    with RedisServer(directory / "redis") as server:
        yield Servers(server)
