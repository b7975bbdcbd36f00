"""The data plane's HTTP/1.1 server: what a listening socket's connections share.

Owns the limits, the connection cap, the clock that ends what takes too long, and the drain. Knows no routes, no
keys, no JSON: it calls `handle` with each request, and `refuse` for the headers and body of an answer to what
it cannot accept. `connection` speaks the protocol, `http_rules` says what is acceptable.
"""

import asyncio
import logging
import resource
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import formatdate
from math import inf
from time import perf_counter
from typing import cast

from backends.outbox import Outbox
from gateway.connection import Connection
from gateway.http_rules import Refusal
from gateway.request import Headers, Request

__all__ = ["Limits", "Refusal", "Request", "Server"]

# (status, code, message, path) -> headers and body of the answer; the path is b"" where none could be read.
Refuse = Callable[[int, str, str, bytes], tuple[Headers, bytes]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may take up. `connections` 0: 40 % of the descriptor limit."""

    header_bytes: int = 32768
    header_count: int = 100
    target_bytes: int = 8192
    body_bytes: int = 32 * 1024 * 1024
    pipelined_bytes: int = 65536
    header_s: float = 20.0  # from the first byte of a request to the end of its head
    idle_s: float = 75.0  # between requests
    body_s: float = 30.0  # plus one second per 64 KiB received
    write_stall_s: float = 60.0  # without the client taking a byte of what waits for it
    connections: int = 0
    upload_paths: frozenset[str] = frozenset()  # where bodies may be larger, and are handed on as they come
    upload_bytes: int = 0


class Server:
    """The protocol factory for a listening socket, its connections, and their clock."""

    def __init__(
        self, handle: Callable[[Request], Awaitable[None]], refuse: Refuse, limits: Limits | None = None
    ) -> None:
        self.handle = handle
        self.refuse = refuse
        self.limits = limits = limits or Limits()
        self.max_connections = limits.connections or _default_connections()
        self.outbox = Outbox()
        self.is_draining = False
        self.turned_away = 0  # connections refused because of the cap, since the start
        self._connections: set[Connection] = set()
        self._tick_s = min(
            1.0, limits.header_s / 4, limits.idle_s / 4, limits.body_s / 4, limits.write_stall_s / 4
        )
        self._timer: asyncio.TimerHandle | None = None
        self._closed: asyncio.Future[None] | None = None
        self.date_line = b""  # a header line; as old as the last tick
        self._turned_away_logged_at = -inf

    def __call__(self) -> asyncio.Protocol:
        return cast("asyncio.Protocol", Connection(self))

    @property
    def open_connections(self) -> int:
        """Sockets open, and handlers that still settle after theirs was closed."""
        return len(self._connections)

    def announce_drain(self) -> None:
        """Every answer from now on closes its connection: a client that is at work leaves without losing a request."""
        self.is_draining = True

    def stop_keepalive(self) -> None:
        """The same, and idle connections close at once."""
        self.is_draining = True
        for connection in tuple(self._connections):
            connection.close_if_idle()

    async def wait_closed(self, timeout_s: float) -> int:
        """How many connections are open still, at the latest after `timeout_s`."""
        if self._connections:
            self._closed = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._closed,), timeout=timeout_s)
        return len(self._connections)

    def cancel_all(self) -> None:
        """Cancels the handlers under way; their clients are still there, to be told why."""
        for connection in tuple(self._connections):
            connection.cancel_handler()

    def abort_all(self) -> None:
        """Drops every connection and with it cancels every handler."""
        for connection in tuple(self._connections):
            connection.transport.abort()

    def add(self, connection: Connection) -> None:
        self._connections.add(connection)
        if self._timer is None:
            self._sweep()

    def discard(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._closed is not None and not self._closed.done():
                self._closed.set_result(None)

    def note_turned_away(self) -> None:
        self.turned_away += 1
        now = perf_counter()
        if now - self._turned_away_logged_at >= 1.0:
            self._turned_away_logged_at = now
            _log.warning(
                "connection cap of %d reached, %d turned away so far", self.max_connections, self.turned_away
            )

    def _sweep(self) -> None:
        # One timer for all connections: a deadline is a float in its connection, so moving it costs nothing.
        self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._sweep)
        self.date_line = f"date: {formatdate(usegmt=True)}\r\n".encode()
        now = perf_counter()
        for connection in tuple(self._connections):
            if connection.deadline_at <= now:
                connection.expire(now)


def _default_connections() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1_000_000 if soft == resource.RLIM_INFINITY else max(1, soft * 2 // 5)
