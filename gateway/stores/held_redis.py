"""Held jobs of all nodes, in Redis. A HeldStore: one script a step."""

import asyncio
from pathlib import Path
from typing import Any, Final

from gateway.overflow.held import Held
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.redis_connection import RedisConnection, Script

_SCRIPT: Final = Script(Path(__file__).with_name("held.lua").read_text())
_TURN_S: Final = 1.0


class RedisHeldStore:
    """One connection, one caller after the other."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._scopes: dict[str, bytes] = {}  # of jobs that are held here
        self._turn = asyncio.Lock()

    async def hold(self, held: Held, for_s: float) -> None:
        self._scopes[held.job_id] = held.scope
        known = held.tenant.encode() + b"\0" + held.scope
        await self._run(held.scope, "hold", held.job_id, known, for_s)

    async def leave(self, job_id: str) -> None:
        self._scopes.pop(job_id, None)
        await self._run(b"", "leave", job_id)

    async def forget(self, job_id: str) -> None:
        await self._run(self._scopes.pop(job_id, b""), "forget", job_id)

    async def take_up(self, scope: bytes, for_s: float) -> Held | None:
        answer = await self._run(scope, "take_up", for_s)
        if not answer:
            return None
        held = _held(answer[0], answer[1])
        self._scopes[held.job_id] = scope
        return held

    async def is_any(self) -> bool:
        return bool(await self._run(b"", "is_any"))

    async def abandoned(self, after_s: float, most: int = 100) -> list[Held]:
        answer = await self._run(b"", "abandoned", after_s, most)
        return [_held(job, known) for job, known in zip(answer[::2], answer[1::2], strict=True)]

    async def close(self) -> None:
        await self._connection.close()

    async def _run(self, scope: bytes, *arguments: Any) -> Any:
        key = self._connection.key
        keys = [key("held:ends"), key("held:known"), key(f"held:scope:{scope.hex()}")]
        try:
            async with asyncio.timeout(_TURN_S), self._turn:
                return await self._connection.run(_SCRIPT, keys, arguments)
        except TimeoutError:
            raise StoreAwayError("no turn in time") from None


def _held(job_id: bytes, known: bytes) -> Held:
    tenant, _, scope = known.partition(b"\0")
    return Held(job_id.decode(), tenant.decode(), scope)
