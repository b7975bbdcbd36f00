"""A ledger sink in Redis: one stream for the rows of all nodes, and the positions beside it.

What Redis loses it loses together, rows and position: so a node sends again what a failover forgot. All keys have one
hash tag; the stream has an end in length and in time, and who reads too late asks for the rows again.
"""

import contextlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from gateway.ledger_row import LedgerRow
from gateway.stores.ledger_sink import Entry, OtherShipperError, Taken
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.redis_connection import RedisConnection, Script

_SHIP: Final = Script(Path(__file__).with_name("ledger_ship.lua").read_text())
_ENTRIES: Final = 2000  # of at most 200 rows: 120 MB at the very worst
_FIRST: Final = "0-0"
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(list[LedgerRow]).decode


class RedisLedgerStream:
    """The sink of the node called `node`."""

    def __init__(self, connection: RedisConnection, node: str, *, entries: int = _ENTRIES) -> None:
        key = connection.key
        self._connection = connection
        self._node = node
        self._entries = entries
        self._shipper = secrets.token_hex(8)
        self._stream, self._positions = key("ledger:rows"), key("ledger:positions")
        self._wanted, self._facts = key("ledger:wanted"), key("ledger:facts")
        self._owner = key(f"ledger:shipper:{node}")

    async def take(self, after: int, position: int, rows: Sequence[LedgerRow]) -> Taken:
        keys = (self._stream, self._positions, self._wanted, self._facts, self._owner)
        data = _encode(list(rows)) if rows else b""
        epoch = secrets.token_hex(8)
        arguments = (self._node, self._shipper, after, position, data, epoch, self._entries)
        at, is_taken = await self._connection.run(_SHIP, keys, arguments)
        if at < 0:
            raise OtherShipperError(self._node)
        return Taken(at, bool(is_taken))

    async def read(self, epoch: str, entry_id: str, limit: int) -> tuple[str, list[Entry]]:
        known = (await self._connection.call("HGET", self._facts, "epoch") or b"").decode()
        after = entry_id if entry_id and known == epoch else _FIRST
        found = await self._connection.call("XRANGE", self._stream, f"({after}", "+", "COUNT", limit)
        return known, [_entry(entry_id, fields) for entry_id, fields in found]

    async def positions(self) -> dict[str, int]:
        found = await self._connection.call("HGETALL", self._positions)
        return {node.decode(): int(position) for node, position in found.items()}

    async def want(self, node: str, position: int) -> None:
        await self._connection.call("HSET", self._wanted, node, position)

    async def close(self) -> None:
        """Whoever ships for this node next need not wait, should we have been the one who does."""
        with contextlib.suppress(StoreAwayError):
            if await self._connection.call("GET", self._owner) == self._shipper.encode():
                await self._connection.call("DEL", self._owner)
        await self._connection.close()


def _entry(entry_id: bytes, fields: dict[bytes, bytes]) -> Entry:
    return Entry(
        entry_id.decode(),
        fields[b"node"].decode(),
        int(fields[b"from"]),
        int(fields[b"to"]),
        _decode(fields[b"rows"]),
    )
