"""One connection to an upstream, and the exchange under way on it.

Owns writing the request, the deadlines, and the end of an exchange. Refuses to know how connections are made and kept
(`backends.transport`), how answers are framed (`backends.http1`) and who receives them (`backends.reply`).
Invariants: an exchange ends exactly once; nothing is raised out of a protocol callback; a connection that was
closed in the middle of an answer is never used again; no task, and no timer, per request.
"""

import asyncio
import math
import ssl
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol, cast

from backends.errors import ErrorKind, UpstreamError
from backends.http1 import AnswerReader
from backends.outbox import Outbox
from backends.reply import Reply

# Below this the request's head and body are joined: a copy is cheaper than a second packet.
_JOIN_BYTES: Final = 64 * 1024
# A connection that the upstream closed while idle fails within about one round trip of the write.
_STALE_WINDOW_S: Final = 1.0
# However long an upstream says that it keeps idle connections.
_MAX_KEEP_S: Final = 60.0
# Loops round timers to their clock's millisecond, so one may fire this much before its time.
_TIMER_SLACK_S: Final = 0.002


class Deadlines(NamedTuple):
    """Seconds. `connect_s` covers name, TCP, proxy and TLS; `first_byte_s` runs from the written request to the head
    of the final answer, of an event stream to the first byte after its head; `idle_s` is the longest gap inside the
    body, while we are reading; `total_s` covers all.
    """

    connect_s: float = 5.0
    first_byte_s: float = 600.0
    idle_s: float = 300.0
    total_s: float = 3600.0


class Keeper(Protocol):
    """Who keeps connections: hears of each one that is free, was closed, and has left the loop."""

    outbox: Outbox

    def on_free(self, connection: "Connection", until_at: float) -> None: ...
    def on_closed(self, connection: "Connection") -> None: ...
    def on_gone(self, connection: "Connection") -> None: ...


class Connection:
    """Carries one exchange at a time. Times are the loop's clock.

    An `asyncio.Protocol` by its methods: with that base it could not be compiled to a class of its own.
    """

    __slots__ = (
        "_deadlines",
        "_exchanges",
        "_heard_at",
        "_is_read_paused",
        "_is_writing",
        "_keepalive_s",
        "_keeper",
        "_loop",
        "_now",
        "_reader",
        "_reply",
        "_sent_at",
        "_timer",
        "_timer_at",
        "_total_at",
        "_transport",
        "_unsent_bytes",
        "_waiter",
        "_watch_s",
    )

    def __init__(
        self, keeper: Keeper, loop: asyncio.AbstractEventLoop, keepalive_s: float, max_head_bytes: int
    ) -> None:
        self._keeper = keeper
        self._loop = loop
        self._now: Callable[[], float] = loop.time
        self._keepalive_s = keepalive_s
        self._reader = AnswerReader(max_head_bytes)
        self._transport: asyncio.Transport | None = None  # None: not yet, or no longer, usable
        self._exchanges = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._is_read_paused = False
        self._is_writing = False  # more of the request waits than the transport likes to hold
        self._unsent_bytes = 0
        # Of the exchange under way: first the waiter for its head, then the reply; neither while idle.
        self._waiter: asyncio.Future[Reply] | None = None
        self._reply: Reply | None = None
        self._deadlines = Deadlines()
        self._watch_s = min(self._deadlines.first_byte_s, self._deadlines.idle_s)
        self._total_at = math.inf
        self._sent_at = 0.0
        self._heard_at = 0.0  # since when the upstream is expected to say something

    def is_usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def exchange(
        self, head: bytes, body: bytes, deadlines: Deadlines, now: float, total_at: float
    ) -> "asyncio.Future[Reply]":
        """Sends a request, now; the future is done when the head of its final answer is there. Who waits for it and no longer
        will, says so with `forsake`.

        The head of an event stream is not enough: vLLM sends it before it has looked at the prompt, so that it would
        tell nothing, and could not be taken back once relayed. The first byte after it must be there, too.
        """
        transport = self._transport
        assert transport is not None, "only usable connections are given out"
        self._exchanges += 1
        self._reader.expect(is_head_request=head.startswith(b"HEAD "))
        if deadlines is not self._deadlines:
            self._deadlines = deadlines
            self._watch_s = min(deadlines.first_byte_s, deadlines.idle_s)
        self._total_at = total_at
        self._sent_at = self._heard_at = now
        waiter: asyncio.Future[Reply] = self._loop.create_future()
        self._waiter = waiter
        if len(body) < _JOIN_BYTES:
            self._keeper.outbox.write(transport, head + body)
        else:
            self._keeper.outbox.write(transport, head)
            self._keeper.outbox.write(transport, body)
        watch_at = min(now + self._watch_s, total_at)
        if self._timer is None or watch_at < self._timer_at:
            self._watch(watch_at)
        return waiter

    def forsake(self, waiter: "asyncio.Future[Reply]") -> None:
        """The sender was cancelled: before the head came, or after it, in the same turn of the loop."""
        if waiter.cancelled() or not waiter.done():
            if self._waiter is waiter:
                self.close()
        elif waiter.exception() is None:
            waiter.result().close()

    def close(self) -> None:
        """Drops the connection at once; who waits for an answer is not told."""
        transport = self._transport
        if transport is None:
            return
        self._transport = self._waiter = self._reply = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._keeper.on_closed(self)
        transport.abort()

    def fail(self, error: UpstreamError) -> None:
        """Drops the connection and tells whoever waits for its answer."""
        waiter, reply = self._waiter, self._reply
        self.close()
        if waiter is None:
            if reply is not None:
                reply.end(error)
        elif not waiter.done():
            waiter.set_exception(error)

    def pause_reading(self) -> None:
        if self._transport is not None and not self._is_read_paused:
            self._is_read_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None and self._is_read_paused:
            self._is_read_paused = False
            self._heard_at = self._now()
            self._transport.resume_reading()

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one by shape only

    def data_received(self, data: bytes) -> None:
        reply = self._reply
        if reply is None and self._waiter is None:
            self.close()  # bytes nobody asked for, as a server's late 408
            return
        reader = self._reader
        reader.feed(data)
        if reply is None:
            reply = self._begin_reply()
            if reply is None:
                return
        else:
            self._heard_at = self._now()
        pieces = reader.pieces
        if self._waiter is not None and (pieces or not reply.is_event_stream) and not self._hand_over(reply):
            return
        if pieces:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            reply.push(body)
            if self._reply is not reply:
                return  # the sink gave up
        if reader.is_complete:
            self._finish(reply)
        elif reader.error is not None:
            self.fail(reader.error)

    def eof_received(self) -> None:
        self._end_of_input(is_clean=not self._is_cut_tls())

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the loop's signature
        self._end_of_input(is_clean=False)
        self._keeper.on_gone(self)

    def pause_writing(self) -> None:
        self._is_writing = True

    def resume_writing(self) -> None:
        self._is_writing = False
        if self._reply is None:
            self._heard_at = self._now()  # the first-byte deadline runs from the written request

    # The parts of an exchange.

    def _begin_reply(self) -> Reply | None:
        """None if there is no whole head, or nobody waits any more."""
        reader, transport = self._reader, self._transport
        if not reader.has_head:
            if reader.error is not None:
                self.fail(reader.error)
            return None
        if transport is None:
            self.close()
            return None
        if transport.get_write_buffer_size():
            reader.is_reusable = False  # answered before it had the whole request: it may never read the rest
        self._reply = Reply(self, reader.status, reader.headers)
        return self._reply

    def _hand_over(self, reply: Reply) -> bool:
        """Gives the reply to who waits for it; False if nobody does any more."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            self.close()  # cancelled in this very turn of the loop
            return False
        self._waiter = None
        self._heard_at = self._now()
        waiter.set_result(reply)
        return True

    def _finish(self, reply: Reply) -> None:
        """The answer is complete: the connection is free again, or closed if it cannot be reused."""
        if self._waiter is not None and not self._hand_over(reply):
            return
        reader = self._reader
        keep_s = self._keepalive_s if reader.idle_limit_s is None else min(reader.idle_limit_s, _MAX_KEEP_S)
        if reader.is_reusable and keep_s > 0:
            self._reply = None
            if self._is_read_paused:
                self.resume_reading()  # or the end of an idle connection would not be seen
            self._keeper.on_free(self, self._heard_at + keep_s)  # its end was heard just now
        else:
            self.close()
        reply.end(None)

    def _end_of_input(self, *, is_clean: bool) -> None:
        reply, waiter = self._reply, self._waiter
        if reply is None and waiter is None:
            self.close()
            return
        error = self._reader.end_of_input(is_clean=is_clean)
        if error is None:
            assert reply is not None, "only an answer with a head is complete"
            self._finish(reply)
            return
        # The kept connection died within a second of our write, without a byte of an answer: all but surely the upstream
        # had closed it as idle before it saw the request. RFC 9112 section 9.3.1 lets a client repeat a POST only if it
        # knows that the first was not applied, and this is strong evidence, no proof: an upstream that took the request
        # and died within that second does the work twice - once, never more. nginx, Go and of late Pingora leave such a
        # POST failed; curl and Chrome repeat it, without a time limit. We follow curl, with the limit: what is lost
        # otherwise is a client's request on every restart of an engine, what is risked is the prefill of an answer that
        # nobody was going to get.
        if error.kind == "reset" and self._reader.is_untouched and self._exchanges > 1:
            error.stale = self._now() - self._sent_at < _STALE_WINDOW_S
        self.fail(error)

    def _is_cut_tls(self) -> bool:
        """Whether a TLS connection ended without its closing alert, as one that was cut does.

        uvloop does not report such an end as EOF; asyncio does, and only the TLS object knows the difference.
        """
        transport = self._transport
        tls = transport.get_extra_info("ssl_object") if transport is not None else None
        if tls is None:
            return False
        try:
            return bool(tls.read(1))
        except ssl.SSLError:
            return True

    # Deadlines. One timer per connection outlives its requests: it fires at the earliest moment at which a deadline
    # could have passed and is set again to the earliest next one, so that a request costs no timer, and a chunk one
    # time stamp.

    def _watch(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._reply is None and self._waiter is None:
            return
        now = self._now()
        limits = self._deadlines
        # Should the head arrive right now, a gap in the body could be too long this soon.
        soonest_gap_at = now + limits.idle_s
        kind: ErrorKind
        if self._waiter is not None:
            self._note_write_progress(now)
            due_at, kind = self._heard_at + limits.first_byte_s, "first_byte_timeout"
            message = f"the upstream did not begin to answer within {limits.first_byte_s:g} s"
        elif self._is_read_paused:
            due_at, kind, message = math.inf, "idle_timeout", ""
        else:
            due_at, kind = self._heard_at + limits.idle_s, "idle_timeout"
            message = f"the upstream's answer stalled for {limits.idle_s:g} s"
        if self._total_at <= due_at:
            due_at, kind = self._total_at, "total_timeout"
            message = f"the upstream's answer was not complete within {limits.total_s:g} s"
        if now >= due_at - _TIMER_SLACK_S:
            self.fail(UpstreamError(kind, message))
        else:
            self._watch(min(due_at, soonest_gap_at))

    def _note_write_progress(self, now: float) -> None:
        """While a large request is being written, the first-byte deadline only runs if the upstream takes nothing."""
        if self._is_writing and self._transport is not None:
            unsent = self._transport.get_write_buffer_size()
            if unsent != self._unsent_bytes:
                self._unsent_bytes = unsent
                self._heard_at = now
