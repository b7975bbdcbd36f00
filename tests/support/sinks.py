"""Receivers of relayed answers that remember what they were told."""

import asyncio
from contextlib import asynccontextmanager

from backends.connection import Deadlines
from backends.errors import UpstreamError
from backends.transport import ConnectionPool, Origin

SHORT = Deadlines(connect_s=5, first_byte_s=5, idle_s=5, total_s=10)


class Recorder:
    """A sink. `bodies` has one entry per call; `arrived(n)` and `end()` wait for what was promised."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.ends: list[UpstreamError | None] = []
        self._changed = asyncio.Event()

    def on_body(self, data: bytes) -> None:
        assert not self.ends, "a body after the end"
        assert data, "an empty piece"
        self.bodies.append(data)
        self._changed.set()

    def on_end(self, error: UpstreamError | None) -> None:
        self.ends.append(error)
        self._changed.set()

    @property
    def body(self) -> bytes:
        return b"".join(self.bodies)

    async def arrived(self, size: int) -> None:
        await self._until(lambda: len(self.body) >= size)

    async def end(self) -> UpstreamError | None:
        await self._until(lambda: self.ends)
        assert len(self.ends) == 1
        return self.ends[0]

    async def _until(self, condition) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


def post(path: str = "/v1/x", body: bytes = b"{}", method: str = "POST") -> tuple[bytes, bytes]:
    """A request's head and body."""
    return f"{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {len(body)}\r\n\r\n".encode(), body


@asynccontextmanager
async def pool_for(url: str, *, proxy=None, ca_file=None, verify=True, **settings):
    """A pool that is closed at the end, when no connection may be left open by its own account or the system's."""
    origin, _ = Origin.parse(url, proxy=proxy, ca_file=ca_file, verify=verify)
    pool = ConnectionPool(origin, **settings)
    try:
        yield pool
    finally:
        await pool.close()
        assert pool.open_connections == pool.idle_connections == 0


async def settled(condition) -> None:
    """Lets the loop run until a condition holds: for what the other side of a socket notices."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)
