"""A body too large for memory, between the connection that receives it and the handler that takes it away.

Owns how much of it is held: beyond that the connection stops reading until the handler has taken something. Knows
neither sockets nor what the bytes mean.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Final

from gateway.http_rules import Refusal

if TYPE_CHECKING:
    from gateway.request import Request

HELD_BYTES: Final = 1024 * 1024


class LargeBody:
    """`pause` and `resume` are the connection's."""

    def __init__(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        self._pause = pause
        self._resume = resume
        self._pieces: list[bytes | bytearray] = []
        self._held_bytes = 0
        self._is_paused = False
        self._is_complete = False
        self._refusal: Refusal | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def take(self) -> bytes:
        """What has come since the last time, at least a byte; b"" at the end. Raises Refusal: too large, too slow."""
        while not self._pieces:
            if self._refusal is not None:
                raise self._refusal
            if self._is_complete:
                return b""
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        taken = b"".join(self._pieces)
        self._pieces.clear()
        self._held_bytes = 0
        if self._is_paused:
            self._is_paused = False
            self._resume()
        return taken

    def add(self, pieces: list[bytes | bytearray]) -> None:
        """For the connection: these have arrived. The list is emptied."""
        self._pieces += pieces
        self._held_bytes += sum(map(len, pieces))
        pieces.clear()
        if self._held_bytes > HELD_BYTES and not self._is_paused:
            self._is_paused = True
            self._pause()
        self._wake()

    def end(self) -> None:
        """For the connection: that was all."""
        self._is_complete = True
        self._is_paused = False
        self._wake()

    def fail(self, refusal: Refusal) -> None:
        """For the connection: the rest will not come."""
        self._refusal = refusal
        self._is_paused = False
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def pieces_of(request: "Request") -> AsyncIterator[bytes]:
    """A request's body as it comes; in one piece where it is not large. Raises Refusal as `Request.body` does."""
    large = request.large_body
    if large is None:
        yield await request.body()
        return
    request.invite_body()
    while piece := await large.take():
        yield piece
