"""The HTTP/1.1 client pool: one per upstream, the public face of everything that speaks to upstreams.

Owns which connections are open, which are idle and for how long. Refuses to know what requests mean, who sends
them and whether another upstream could serve them. Invariants: a connection carries one exchange at a time; every
socket opened is counted until it is closed; `send` either returns a Reply or leaves no connection behind.
"""

import asyncio
from collections.abc import Callable
from typing import cast

from backends.connection import Connection, Deadlines
from backends.dialing import dial
from backends.errors import UpstreamError
from backends.origin import Origin
from backends.outbox import Outbox
from backends.reply import Reply, Sink

__all__ = ["ConnectionPool", "Deadlines", "Origin", "Reply", "Sink"]


class ConnectionPool:
    """Connections to one origin, kept between requests, the last used first.

    `keepalive_s` must stay below the upstream's own idle limit, or requests race its close: vLLM's (uvicorn's) is
    5 s, hence 4. There is no limit on connections: who may send how much is decided before.
    """

    __slots__ = (
        "_all_gone",
        "_asks_proxy",
        "_idle",
        "_is_closed",
        "_keepalive_s",
        "_leaving",
        "_loop",
        "_max_head_bytes",
        "_max_idle",
        "_open",
        "_sweeper",
        "origin",
        "outbox",
    )

    def __init__(
        self, origin: Origin, *, keepalive_s: float = 4.0, max_idle: int = 256, max_head_bytes: int = 65536
    ) -> None:
        self.origin = origin
        # Whether requests go to a proxy as such, not through a tunnel.
        self._asks_proxy = origin.proxy is not None and origin.scheme == "http"
        self.outbox = Outbox()
        self._keepalive_s = keepalive_s
        self._max_idle = max_idle
        self._max_head_bytes = max_head_bytes
        self._open: set[Connection] = set()
        # A dict is a stack that can also be left from the middle. The value: until when a connection may be used.
        self._idle: dict[Connection, float] = {}
        self._leaving: set[Connection] = set()  # closed by us, not yet by the loop
        self._all_gone = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # of the first request
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<ConnectionPool {self.origin}: {self.open_connections} open, {self.idle_connections} idle>"

    @property
    def open_connections(self) -> int:
        return len(self._open)

    @property
    def idle_connections(self) -> int:
        return len(self._idle)

    async def send(
        self,
        head: bytes,
        body: bytes,
        deadlines: Deadlines,
        on_dispatch: Callable[[], None] | None = None,
    ) -> Reply:
        """Sends a request; returns when the head of its final answer is there.

        `head` is the whole request head with its blank line, in origin form. `on_dispatch` hears when its first byte
        is written: until then the upstream knows nothing of it. UpstreamError if there is no answer.
        Cancelled, it closes the connection at once. When the body of the reply has ended, its connection returns
        to the pool by itself.
        """
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        now = loop.time()
        total_at = now + deadlines.total_s
        connection = self._take_idle(now)
        if self._asks_proxy:
            head = self._in_absolute_form(head)
        while True:
            if connection is None:
                limit_s = min(deadlines.connect_s, max(0.0, total_at - loop.time()))
                connection = await self._connect(loop, limit_s)
                now = loop.time()
            if on_dispatch is not None:
                on_dispatch()
            waiter = connection.exchange(head, body, deadlines, now, total_at)
            try:
                reply = await waiter
            except UpstreamError as error:
                if not error.stale:
                    raise
            except BaseException:
                connection.forsake(waiter)
                raise
            else:
                return self._checked(reply) if self._asks_proxy else reply
            # It was closed as idle before it saw the request: once more, on a new one, which is never called stale.
            connection = None

    async def close(self) -> None:
        """Closes every connection; exchanges under way end with an error. Returns when the sockets are closed."""
        self._is_closed = True
        for connection in list(self._open):
            connection.fail(UpstreamError("reset", "the gateway closed its connections to this upstream"))
        while self._leaving:
            self._all_gone.clear()
            await self._all_gone.wait()

    # Called by connections.

    def on_free(self, connection: Connection, until_at: float) -> None:
        self._idle[connection] = until_at
        if len(self._idle) > self._max_idle:
            next(iter(self._idle)).close()  # the one unused for longest
        if self._sweeper is None and self._idle:
            self._sweeper = asyncio.get_running_loop().call_at(until_at, self._sweep)

    def on_closed(self, connection: Connection) -> None:
        if connection not in self._open:
            return  # still being dialled: uvloop, cancelled there, never reports the connection as lost
        self._open.discard(connection)
        self._leaving.add(connection)
        if self._idle.pop(connection, None) is not None and not self._idle and self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def on_gone(self, connection: Connection) -> None:
        self._leaving.discard(connection)
        if not self._leaving:
            self._all_gone.set()

    def _take_idle(self, now: float) -> Connection | None:
        while self._idle:
            connection, until_at = self._idle.popitem()
            if now < until_at and connection.is_usable():
                return connection
            connection.close()
        return None

    def _sweep(self) -> None:
        """Closes what was idle for too long; runs only while something is idle."""
        loop = asyncio.get_running_loop()
        self._sweeper = None
        now = loop.time()
        for connection in [c for c, until_at in self._idle.items() if until_at <= now]:
            connection.close()
        if self._idle:
            self._sweeper = loop.call_at(min(self._idle.values()), self._sweep)

    async def _connect(self, loop: asyncio.AbstractEventLoop, limit_s: float) -> Connection:
        connection = Connection(self, loop, self._keepalive_s, self._max_head_bytes)
        try:
            await dial(self.origin, cast("asyncio.Protocol", connection), limit_s)
        except BaseException:
            connection.close()
            raise
        if self._is_closed or not connection.is_usable():
            connection.close()
            who = (
                "the gateway has closed its connections"
                if self._is_closed
                else "the upstream closed a new connection"
            )
            raise UpstreamError("connect", f"{who} ({self.origin})")
        self._open.add(connection)
        return connection

    def _in_absolute_form(self, head: bytes) -> bytes:
        """What a proxy wants to read (RFC 9112 section 3.2.2), with the credentials that are meant for it alone."""
        proxy = self.origin.proxy
        assert proxy is not None
        method, _, rest = head.partition(b" ")
        target, _, fields = rest.partition(b"\r\n")
        credentials = f"proxy-authorization: {proxy.authorization}\r\n" if proxy.authorization else ""
        return b"%s %s%s\r\n%s%s" % (method, str(self.origin).encode(), target, credentials.encode(), fields)

    def _checked(self, reply: Reply) -> Reply:
        """407 is the proxy's own answer: the upstream has not seen the request."""
        if reply.status == 407:
            reply.close()
            raise UpstreamError(
                "proxy",
                f"the {self.origin.proxy} refused our credentials (407); set user and password in its URL",
            )
        return reply
