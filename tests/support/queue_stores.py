"""Queues for tests: two processes' views of one store, and its clock."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gateway.overflow.store import QueueStore
from gateway.stores.queue_sqlite import SqliteQueueStore
from tests.support.queue_clock import QueueClock

STORES = ("sqlite",)


class Queue(NamedTuple):
    store: QueueStore
    other: QueueStore
    clock: QueueClock

    async def close(self) -> None:
        await self.store.close()
        await self.other.close()


class Servers:
    async def queue(self, kind: str, directory: Path, **settings: Any) -> Queue:
        clock = QueueClock()
        first = SqliteQueueStore(directory, clocks=clock.clocks, **settings)
        return Queue(first, SqliteQueueStore(directory, clocks=clock.clocks, **settings), clock)


@contextmanager
def opened(directory: Path) -> Iterator[Servers]:
    yield Servers()
