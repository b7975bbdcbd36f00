"""Answers kept for `Idempotency-Key` in Redis: known on all nodes. One script a step; a claim is a key that expires.

As `gateway.stores.answer_table`, but that beyond the total the oldest of all go, whoever's they are. Every failure is a
StoreAwayError.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gateway.stores.answer_table import LEASE_S, Asked, Claim, KeptAnswer
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.redis_connection import RedisConnection, Script

_SCRIPT: Final = Script(Path(__file__).with_name("answers.lua").read_text())
_LEASE_MS: Final = int(LEASE_S * 1000)
# With those who wait for the connection before one; a frozen server holds nobody up for longer.
_TURN_S: Final = 1.0


class RedisAnswers:
    """An AnswerStore. One connection, one caller after the other."""

    def __init__(self, connection: RedisConnection, total_bytes: int) -> None:
        self._connection = connection
        self._total_bytes = total_bytes
        self._scopes: dict[str, bytes] = {}  # of claims, by owner
        self._turn = asyncio.Lock()

    async def claim(self, asked: Asked, keep_s: float) -> Claim:
        answer = await self._run(
            asked.scope, "claim", asked.fingerprint, asked.owner, _LEASE_MS, int(keep_s * 1000)
        )
        state = answer[0].decode()
        if state == "mine":
            self._scopes[asked.owner] = asked.scope
        if state != "done":
            return Claim(state)
        request_id, status, headers, body, is_stream = answer[1]
        kept = KeptAnswer(request_id.decode(), int(status), headers, body, is_stream == b"1")
        return Claim("done", kept)

    async def finish(self, scope: bytes, owner: str, answer: KeptAnswer) -> None:
        self._scopes.pop(owner, None)
        told = (answer.request_id, answer.status, answer.headers, answer.body, int(answer.is_stream))
        bounds = (scope.hex(), self._total_bytes, self._connection.key("answer:"))
        await self._run(scope, "finish", owner, *told, *bounds)

    async def release(self, scope: bytes, owner: str) -> None:
        self._scopes.pop(owner, None)
        await self._run(scope, "release", owner)

    async def renew(self, owners: Sequence[str]) -> None:
        for owner in owners:
            scope = self._scopes.get(owner)
            if scope is not None:
                await self._run(scope, "renew", owner, _LEASE_MS)

    async def forget(self, total_bytes: int) -> None:
        """What has expired is gone by itself; from the next answer on this total holds."""
        self._total_bytes = total_bytes

    async def close(self) -> None:
        await self._connection.close()

    async def _run(self, scope: bytes, *arguments: Any) -> Any:
        key = self._connection.key
        keys = [key(f"answer:{scope.hex()}"), key("answers:index"), key("answers:bytes")]
        try:
            async with asyncio.timeout(_TURN_S), self._turn:
                return await self._connection.run(_SCRIPT, keys, arguments)
        except TimeoutError:
            raise StoreAwayError("no turn in time") from None
