"""Receivers of webhooks that operators made, in Redis: one hash, the same for all nodes."""

import asyncio

import msgspec

from gateway.overflow.endpoints import Endpoint
from gateway.stores.redis_connection import RedisConnection


class RedisEndpoints:
    """An EndpointStore. One connection, one caller after the other."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._key = connection.key("webhooks:endpoints")
        self._turn = asyncio.Lock()

    async def all(self) -> list[Endpoint]:
        async with self._turn:
            records = await self._connection.call("HVALS", self._key)
        return [msgspec.json.decode(record, type=Endpoint) for record in records]

    async def put(self, endpoint: Endpoint) -> None:
        async with self._turn:
            await self._connection.call("HSET", self._key, endpoint.id, msgspec.json.encode(endpoint))

    async def remove(self, endpoint_id: str) -> bool:
        async with self._turn:
            return bool(await self._connection.call("HDEL", self._key, endpoint_id))

    async def close(self) -> None:
        await self._connection.close()
