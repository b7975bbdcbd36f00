"""The answer to one request, on its way to whoever asked.

Owns delivery: read as a whole or relayed as it arrives, held back while nobody takes it, given up. Refuses to know
sockets, framing and deadlines. Invariants: bytes are delivered in order and by the reads they came in; a sink hears
its end once and nothing after it; a sink that fails costs only its own answer.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Final, Protocol

from backends.errors import UpstreamError

READ_AHEAD_BYTES: Final = 256 * 1024

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Who an answer's body is relayed to. Called from the event loop; must not block."""

    def on_body(self, data: bytes) -> None:
        """Decoded body bytes: all that one read of the socket brought, never merged with another's."""

    def on_end(self, error: UpstreamError | None) -> None:
        """Exactly once, unless the reply was closed before. None: the body is complete by its framing."""


class Link(Protocol):
    """What a reply may do to the connection it comes over."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...


class Reply:
    """The answer to one request. It must be read, relayed or closed, or its connection waits for `total_s`."""

    __slots__ = (
        "_connection",
        "_error",
        "_held",
        "_held_bytes",
        "_is_ended",
        "_is_paused",
        "_news",
        "_sink",
        "headers",
        "is_event_stream",
        "status",
    )

    def __init__(self, connection: Link, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status
        self.headers = headers  # by lower-case name
        self.is_event_stream = _is_event_stream(headers.get(b"content-type", b""))
        self._connection: Link | None = connection  # None: nothing more will come
        self._sink: Sink | None = None
        self._held: list[bytes] = []  # one entry per read
        self._held_bytes = 0
        self._is_paused = False
        self._is_ended = False
        self._error: UpstreamError | None = None
        self._news: asyncio.Future[None] | None = None  # somebody waits for more, or for the end

    def header(self, name: bytes) -> bytes | None:
        """The value under a lower-case name."""
        return self.headers.get(name)

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body. UpstreamError if it breaks off, stalls or exceeds the limit."""
        body = self.take_whole(limit_bytes)
        if body is not None:
            return body
        whole = _Whole(self, limit_bytes)
        self.relay(whole)
        if not whole.is_ended:
            whole.waiter = asyncio.get_running_loop().create_future()
            try:
                await whole.waiter
            except BaseException:
                self.close()
                raise
        if whole.error is not None:
            raise whole.error
        return b"".join(whole.pieces)

    def take_whole(self, limit_bytes: int) -> bytes | None:
        """The whole body if it is all here before anyone asked, as a short one is; None: `read` it."""
        if (
            not self._is_ended
            or self._error is not None
            or self._sink is not None
            or self._held_bytes > limit_bytes
        ):
            return None
        self._sink = _DEAF
        held = self._held
        return held[0] if len(held) == 1 else b"".join(held)

    async def first(self, is_enough: Callable[[bytes], bool]) -> bytes:
        """The beginning of the body, as soon as there is enough of it or no more will come; it stays to be read or relayed."""
        while True:
            data = b"".join(self._held)
            if self._is_ended or is_enough(data):
                return data
            self._news = asyncio.get_running_loop().create_future()
            try:
                await self._news
            finally:
                self._news = None

    def relay(self, sink: Sink) -> None:
        """Pushes what has arrived to `sink` before it returns, and from then on whatever comes."""
        if self._sink is not None:
            raise RuntimeError("an answer can be read or relayed only once, and not after it was closed")
        self._sink = sink
        self._flush()

    def pause(self) -> None:
        """No more `on_body` until `resume`; the upstream is held back and the idle deadline stands still.

        The end is still told while nothing is held.
        """
        self._is_paused = True
        if self._connection is not None:
            self._connection.pause_reading()

    def resume(self) -> None:
        self._is_paused = False
        self._flush()

    def close(self) -> None:
        """Gives the answer up: the connection is dropped at once and the sink hears nothing more. Idempotent."""
        connection, sink = self._connection, self._sink
        if connection is None and sink is _DEAF:
            return  # it was read whole, or closed before
        self._connection, self._sink = None, _DEAF
        self._is_ended = True
        self._held.clear()
        if connection is not None:
            connection.close()
        if isinstance(sink, _Whole):
            sink.on_end(UpstreamError("incomplete", "the answer was given up while it was being read"))

    # Called by the connection.

    def push(self, data: bytes) -> None:
        """Body bytes, all that one read brought."""
        if self._sink is not None and not self._is_paused:
            self._deliver(self._sink, data)
            return
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > READ_AHEAD_BYTES and self._connection is not None:
            self._connection.pause_reading()
        if self._news is not None:
            self._tell_news()

    def end(self, error: UpstreamError | None) -> None:
        """Nothing more will come, and the connection is no longer this reply's."""
        self._connection = None
        self._is_ended = True
        self._error = error
        if self._news is not None:
            self._tell_news()
        if self._sink is not None and not self._held:
            self._tell_end(self._sink)

    def _tell_news(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _flush(self) -> None:
        """Delivers what is held, read by read; the sink may pause or close in the middle of it."""
        while self._held and self._sink is not None and not self._is_paused:
            data = self._held.pop(0)
            self._held_bytes -= len(data)
            self._deliver(self._sink, data)
        if self._sink is None or self._held:
            return
        if self._is_ended:
            self._tell_end(self._sink)
        elif self._connection is not None and not self._is_paused:
            self._connection.resume_reading()

    def _deliver(self, sink: Sink, data: bytes) -> None:
        try:
            sink.on_body(data)
        except Exception:  # noqa: BLE001 - it is logged, and must not reach the event loop
            self._give_up_on_sink()

    def _tell_end(self, sink: Sink) -> None:
        self._sink = _DEAF
        try:
            sink.on_end(self._error)
        except Exception:  # noqa: BLE001 - it is logged, and must not reach the event loop
            self._give_up_on_sink()

    def _give_up_on_sink(self) -> None:
        _log.exception("the receiver of an upstream's answer failed; the answer is dropped")
        self.close()


@lru_cache(maxsize=64)
def _is_event_stream(content_type: bytes) -> bool:
    return content_type.lstrip()[:17].lower() == b"text/event-stream"


class _Deaf:
    """Takes the place of a sink that is to hear nothing more."""

    def on_body(self, data: bytes) -> None:
        pass

    def on_end(self, error: UpstreamError | None) -> None:
        pass


_DEAF: Final = _Deaf()


class _Whole:
    """A sink that gathers a body under a limit, for `Reply.read`."""

    __slots__ = ("error", "is_ended", "limit_bytes", "pieces", "reply", "size_bytes", "waiter")

    def __init__(self, reply: Reply, limit_bytes: int) -> None:
        self.reply = reply
        self.limit_bytes = limit_bytes
        self.pieces: list[bytes] = []
        self.size_bytes = 0
        self.waiter: asyncio.Future[None] | None = None
        self.error: UpstreamError | None = None
        self.is_ended = False

    def on_body(self, data: bytes) -> None:
        self.pieces.append(data)
        self.size_bytes += len(data)
        if self.size_bytes > self.limit_bytes:
            self.on_end(UpstreamError("too_large", f"the upstream's answer exceeds {self.limit_bytes} bytes"))
            self.reply.close()

    def on_end(self, error: UpstreamError | None) -> None:
        if self.is_ended:
            return
        self.is_ended = True
        self.error = error
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)
