"""Held jobs of one machine, in its database: shared by all of its workers. A HeldStore; opened by the first held request.

What is lost with it costs an answer that nobody asks for again, never a job: those are the queue's.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from gateway.overflow.held import Held
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.sqlite import DATABASE_NAME, Connection, StorageError, explained, open_database

_T = TypeVar("_T")


class SqliteHeldStore:
    """`storage` is the data folder. A thread of its own, connected by the first call."""

    def __init__(self, storage: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = storage / DATABASE_NAME
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="held")
        self._connection: Connection | None = None

    async def hold(self, held: Held, for_s: float) -> None:
        now_time = self._clock()
        row = (held.job_id, held.tenant, held.scope, now_time, now_time + for_s)
        await self._run(
            lambda c: c.execute(
                "INSERT INTO held VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (job_id) DO UPDATE SET until_time = excluded.until_time",
                row,
            )
        )

    async def leave(self, job_id: str) -> None:
        bindings = (self._clock(), job_id)
        await self._run(
            lambda c: c.execute("UPDATE held SET until_time = min(until_time, ?) WHERE job_id = ?", bindings)
        )

    async def forget(self, job_id: str) -> None:
        await self._run(lambda c: c.execute("DELETE FROM held WHERE job_id = ?", (job_id,)))

    async def take_up(self, scope: bytes, for_s: float) -> Held | None:
        now_time = self._clock()
        query = (
            "UPDATE held SET until_time = ? WHERE job_id = (SELECT job_id FROM held WHERE scope = ? "
            "AND until_time <= ? ORDER BY since_time LIMIT 1) RETURNING job_id, tenant, scope"
        )
        rows = await self._run(lambda c: c.execute(query, (now_time + for_s, scope, now_time)).fetchall())
        return _held(rows[0]) if rows else None

    async def is_any(self) -> bool:
        rows = await self._run(lambda c: c.execute("SELECT EXISTS (SELECT 1 FROM held)").fetchall())
        return bool(rows[0][0])

    async def abandoned(self, after_s: float, most: int = 100) -> list[Held]:
        before_time = self._clock() - after_s
        query = (
            "DELETE FROM held WHERE job_id IN (SELECT job_id FROM held WHERE until_time < ? "
            "ORDER BY until_time LIMIT ?) RETURNING job_id, tenant, scope"
        )
        rows = await self._run(lambda c: c.execute(query, (before_time, most)).fetchall())
        return [_held(row) for row in rows]

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)
        if self._connection is not None:
            self._connection.close()

    async def _run(self, work: Callable[[Connection], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._do, work)

    def _do(self, work: Callable[[Connection], _T]) -> _T:
        try:
            if self._connection is None:
                self._connection = open_database(self._path)
            with explained(self._path):
                return work(self._connection)
        except StorageError as error:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            raise StoreAwayError(str(error)) from error


def _held(row: tuple[Any, ...]) -> Held:
    job_id, tenant, scope = row
    return Held(job_id, tenant, scope)
