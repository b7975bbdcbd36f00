"""Receivers of webhooks that operators made, in the database of one machine.

Knows an endpoint as a record with an id; what is in it is `gateway.overflow.endpoints`' business.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from gateway.overflow.endpoints import Endpoint
from gateway.stores.sqlite import DATABASE_NAME, Connection, database


class SqliteEndpoints:
    """An EndpointStore. A connection for each call: calls are seconds apart."""

    def __init__(self, storage: Path) -> None:
        self._path = storage / DATABASE_NAME

    async def all(self) -> list[Endpoint]:
        rows = await self._run(lambda c: c.execute("SELECT record FROM webhook_endpoint").fetchall())
        return [msgspec.json.decode(record, type=Endpoint) for (record,) in rows]

    async def put(self, endpoint: Endpoint) -> None:
        record = (endpoint.id, msgspec.json.encode(endpoint))
        await self._run(
            lambda c: c.execute(
                "INSERT INTO webhook_endpoint VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record",
                record,
            ).fetchall()
        )

    async def remove(self, endpoint_id: str) -> bool:
        sql = "DELETE FROM webhook_endpoint WHERE id = ? RETURNING 1"
        return bool(await self._run(lambda c: c.execute(sql, (endpoint_id,)).fetchall()))

    async def close(self) -> None:
        """Nothing is open."""

    async def _run(self, work: Callable[[Connection], Any]) -> Any:
        def run() -> Any:
            with database(self._path) as connection:
                return work(connection)

        return await asyncio.to_thread(run)
