"""The store of limits in Redis or Valkey: many nodes, one round trip an update, the server's own time.

The script beside this file does what `policies.limits.counting` says, atomically; the conformance suite holds them
together. All keys have one hash tag. A server that is new or lost its data takes no updates until somebody who has
the ledger has filled the counters again: until then it counts as away.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from gateway.stores.limit_store import StoreAwayError
from gateway.stores.redis_connection import RedisConnection, Script
from policies.limits.messages import Counter, Reading, Refusal, Reply, Update

_UPDATE: Final = Script(Path(__file__).with_name("limit_update.lua").read_text())
_FILLER: Final = "filler"
_FILL_COUNTERS: Final = 200  # in one call: a server must not be held up for long
_FILL_S: Final = 2.0
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(tuple[Any, ...]).decode


class RedisLimitStore:
    """A LimitStore. `now_us` replaces the server's time; for tests."""

    def __init__(self, connection: RedisConnection, now_us: Callable[[], int] | None = None) -> None:
        self._connection = connection
        self._now_us = now_us
        key = connection.key
        self._clock, self._holders = key("limits:clock"), key("limits:holders")
        self._turn, self._name = key("limits:turn"), secrets.token_hex(8)

    async def update(self, update: Update) -> Reply:
        return await self._update(update, "")

    async def read(self, counters: Sequence[Counter]) -> tuple[int, list[Reading]]:
        reply = await self.update(Update("", 0, 0, tuple(counters)))
        return reply.now_us, list(reply.readings)

    async def is_filled(self) -> bool:
        """Whether updates are taken. StoreAwayError when it does not say."""
        return bool(await self._connection.call("HEXISTS", self._clock, "filled"))

    async def fill(self, spent: Sequence[tuple[Counter, Mapping[int, int]]]) -> None:
        """What was spent of each counter, by the start of slice or period; then updates are taken.

        Of no effect once somebody has filled it; may be repeated when it failed on the way.
        """
        for at in range(0, len(spent), _FILL_COUNTERS):
            part = spent[at : at + _FILL_COUNTERS]
            posts = [
                (index, start, units)
                for index, (_, by_start) in enumerate(part)
                for start, units in by_start.items()
            ]
            filling = Update(_FILLER, 1, 1, tuple(counter for counter, _ in part), tuple(posts), is_last=True)
            try:
                await self._update(filling, "fill")
            except NotFilledError:
                return  # somebody else was faster
        await self._connection.call("HSETNX", self._clock, "filled", 1)

    async def take_turn(self, length_s: float) -> bool:
        """Whether nobody else has the turn to set counters right; it ends by itself."""
        call = self._connection.call
        return await call("SET", self._turn, self._name, "NX", "PX", int(length_s * 1000)) is not None

    async def end_turn(self) -> None:
        if await self._connection.call("GET", self._turn) == self._name.encode():
            await self._connection.call("DEL", self._turn)

    async def problems(self) -> list[str]:
        """What an operator should change there."""
        return await self._connection.problems()

    async def close(self) -> None:
        await self._connection.close()

    async def _update(self, update: Update, mode: str) -> Reply:
        key = self._connection.key
        keys = [self._clock, self._holders, key(f"limits:holder:{update.holder}")]
        keys += [key(f"limits:counter:{counter.key}") for counter in update.counters]
        arguments = (_message(update), "" if self._now_us is None else self._now_us(), mode)
        answer = await self._connection.run(_UPDATE, keys, arguments, _FILL_S if mode else None)
        if answer is None:
            raise NotFilledError("its counters wait to be filled from the ledger")
        return _reply(answer)


class NotFilledError(StoreAwayError):
    """The server is there, but knows of no spending: it is new, or lost its data. (While filling: it was filled.)"""


def _message(update: Update) -> bytes:
    return _encode(
        (
            update.holder,
            update.number,
            update.ttl_us,
            [
                (c.kind, c.amount, c.window_us, c.slice_us, c.burst, c.periods[0], c.periods[1], c.periods[2])
                for c in update.counters
            ],
            update.posts,
            update.releases,
            update.claims,
            update.groups,
            update.wants,
            update.is_last,
        )
    )


def _reply(answer: bytes) -> Reply:
    now_us, is_known, was_applied, holders, refusals, granted, readings = _decode(answer)
    return Reply(
        now_us,
        is_known=is_known,
        was_applied=was_applied,
        holders=holders,
        refusals=tuple(Refusal(*refusal) if refusal else None for refusal in refusals),
        granted=tuple(granted),
        readings=tuple(Reading(*reading) for reading in readings),
    )
