"""One client's connection: its bytes become requests, and one task runs the handler on each in turn.

Owns framing, keep-alive, deadlines, backpressure and the ways a connection ends. Never trusts `X-Forwarded-*`.

Invariants: the next request is not looked at before the handler of the current one has returned; a client that
closes its side (RST, or FIN: half-closed clients count as gone, as with nginx) cancels the handler at once; what
was not read of a request's body ends the connection; an answer that broke off never looks complete.
"""

import asyncio
import logging
import socket
import struct
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Final, cast

from gateway.http_rules import (
    CHUNKED,
    HEAD_END,
    ChunkedBody,
    Head,
    Refusal,
    append_piece,
    body_too_large,
    check_partial_head,
    claimed_path,
)
from gateway.large_body import LargeBody
from gateway.request import Request, answer_head

if TYPE_CHECKING:
    from gateway.inbound import Server

_log = logging.getLogger(__name__)

WRITE_BUFFER_BYTES: Final = 256 * 1024
# After an early answer the client gets this long, and may send this much, before the connection is cut: closing
# with unread input makes the kernel send a reset, which can destroy the answer before the client has read it.
LINGER_S: Final = 2.0
LINGER_BYTES: Final = 256 * 1024
BODY_RATE_BYTES_PER_S: Final = 65536

# What the bytes that arrive next are.
_HEAD: Final = 0  # the beginning of a request, or nothing yet
_BODY: Final = 1
_BUSY: Final = 2  # the request is here; anything more is pipelined
_DROPPING: Final = 3  # the rest of a body that will not be read, while the answer is made
_LINGERING: Final = 4  # the same, after the last answer
_CLOSING: Final = 5

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class Connection:
    """One client's connection: turns its bytes into requests and runs the handler on each.

    An `asyncio.Protocol` by its methods: with that base it could not be compiled to a class of its own.
    """

    __slots__ = (
        "_body_started_at",
        "_chunked",
        "_head",
        "_held_at",
        "_is_lost",
        "_is_read_paused",
        "_large",
        "_left_bytes",
        "_phase",
        "_pieces",
        "_received_bytes",
        "_request",
        "_stash",
        "_task",
        "_unsent_bytes",
        "_waiter",
        "deadline_at",
        "is_gone",
        "is_write_paused",
        "peer",
        "server",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, server: "Server") -> None:
        self.server = server
        self.peer = ""
        self.deadline_at = inf  # perf_counter
        self.is_gone = False
        self.is_write_paused = False
        self._phase = _HEAD
        self._head: Head | None = None  # the last one
        self._request: Request | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None  # of the task, between requests
        self._stash = b""  # a head begun, or what came after the request in hand
        self._is_read_paused = False
        self._is_lost = False  # the transport is done with us
        # The body being received: by chunks, or so many bytes of a known length.
        self._chunked: ChunkedBody | None = None
        self._pieces: list[bytes | bytearray] = []
        self._large: LargeBody | None = None  # where the handler takes it from piece by piece
        self._held_at = 0.0
        self._left_bytes = 0
        self._received_bytes = 0
        self._body_started_at = 0.0
        self._unsent_bytes = 0

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast("asyncio.Transport", transport)  # uvloop's does not inherit from it
        server = self.server
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.peer = str(peer[0])
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        connections = server.open_connections
        server.add(self)
        if connections >= server.max_connections:
            server.note_turned_away()
            if connections >= server.max_connections * 5 // 4 + 16:
                transport.abort()  # too many already that are told politely
            else:
                self._refuse(
                    Refusal(503, "too_many_connections", "too many connections are open here; try again")
                )
        else:
            self.deadline_at = perf_counter() + server.limits.idle_s

    def data_received(self, data: bytes) -> None:
        phase = self._phase
        if phase == _HEAD:
            self._read_head(self._stash + data if self._stash else data)
        elif phase == _BODY:
            self._read_body(data)
        elif phase == _BUSY:
            self._keep_for_later(data)
        elif phase == _LINGERING:
            self._left_bytes -= len(data)
            if self._left_bytes < 0:
                self.transport.abort()

    def eof_received(self) -> None:
        request = self._request
        if request is not None and not request.is_finished:
            self._lose()
            self.transport.abort()
        else:
            self._close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        self._phase = _CLOSING
        self._is_lost = True
        self._lose()
        if self._task is None:
            self.server.discard(self)

    def pause_writing(self) -> None:
        self.is_write_paused = True
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self.deadline_at = min(self.deadline_at, perf_counter() + self.server.limits.write_stall_s)
        if self._request is not None:
            self._request.client_lags()

    def resume_writing(self) -> None:
        self.is_write_paused = False
        if self._phase == _BUSY:
            self.deadline_at = inf
        if self._request is not None:
            self._request.client_caught_up()
        else:
            self._wake()

    # reading

    def _read_head(self, data: bytes) -> None:
        if data[0] in b"\r\n":
            data = data.lstrip(b"\r\n")  # tolerated before a request (RFC 9112 section 2.2)
            if not data:
                return
        limits = self.server.limits
        seen = len(self._stash)
        end = data.find(HEAD_END, max(0, seen - 3)) + 4
        try:
            if end < 4 or end > limits.header_bytes:
                check_partial_head(data, seen, limits.header_bytes, limits.target_bytes)
                if not seen:
                    self.deadline_at = perf_counter() + limits.header_s
                self._stash = data
                return
            head = self._head
            if head is None or not head.is_repeated_by(data[:end]):
                head = self._head = Head(data[:end], limits.target_bytes, limits.header_count)
        except Refusal as refusal:
            self._refuse(refusal, claimed_path(data))
            return
        self._stash = b""
        self._request = request = Request(self, head, perf_counter())
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
            self._task.add_done_callback(self._task_ended)
        else:
            self._wake()
        if head.length == len(data) - end <= limits.body_bytes:  # all of it came at once, and nothing else
            self._phase = _BUSY
            self.deadline_at = inf
            request.body_ended(data[end:])
            return
        self._expect_body(request, head)
        if end < len(data):
            self.data_received(data[end:])

    def _expect_body(self, request: Request, head: Head) -> None:
        length = head.length
        if length == 0:
            self._phase = _BUSY
            self.deadline_at = inf
            request.body_ended(b"")
            return
        limits = self.server.limits
        self._phase = _BODY
        self._received_bytes = 0
        self._body_started_at = request.received_at
        self.deadline_at = inf if head.expects_continue else request.received_at + limits.body_s
        body_bytes = limits.body_bytes
        if request.path in limits.upload_paths:
            body_bytes = limits.upload_bytes
            self._large = request.large_body = LargeBody(self._hold_body, self._go_on)
        if length == CHUNKED:
            self._chunked = ChunkedBody(body_bytes, limits.header_bytes)
        elif length > body_bytes:
            self._give_up_body(body_too_large(body_bytes))
        else:
            self._left_bytes = length

    def _read_body(self, data: bytes) -> None:
        request = self._request
        assert request is not None
        chunked = self._chunked
        if chunked is not None:
            try:
                rest = chunked.feed(data)
            except Refusal as refusal:
                self._give_up_body(refusal)
                return
            is_complete = chunked.is_complete
            pieces = chunked.pieces
        else:
            rest = data[self._left_bytes :]
            data = data[: self._left_bytes]
            self._left_bytes -= len(data)
            is_complete = not self._left_bytes
            pieces = self._pieces
            if self._large is not None or not is_complete or pieces:
                append_piece(pieces, data)
        if self._large is not None:
            self._large.add(pieces)
        if not is_complete:
            self._received_bytes += len(data)
            self._set_body_deadline()
            return
        self._phase = _BUSY
        self.deadline_at = inf
        self._chunked = None
        self._pieces = []
        if self._large is not None:
            self._large.end()
            self._large = None
            self._read_on()
        else:
            request.body_ended(b"".join(pieces) if pieces or chunked is not None else data)
        if rest:
            self._keep_for_later(rest)

    def _set_body_deadline(self) -> None:
        if not self._is_read_paused:
            self.deadline_at = (
                self._body_started_at
                + self.server.limits.body_s
                + self._received_bytes / BODY_RATE_BYTES_PER_S
            )

    def _hold_body(self) -> None:
        """The handler lags behind: what it takes to catch up is not the client's time."""
        self._is_read_paused = True
        self._held_at = perf_counter()
        self.deadline_at = inf
        self.transport.pause_reading()

    def _go_on(self) -> None:
        if self._phase == _BODY:
            self._read_on()
            self._body_started_at += perf_counter() - self._held_at
            self._set_body_deadline()

    def _read_on(self) -> None:
        if self._is_read_paused:
            self._is_read_paused = False
            self.transport.resume_reading()

    def _give_up_body(self, refusal: Refusal) -> None:
        self._phase = _DROPPING
        self.deadline_at = inf
        self._chunked = None
        self._pieces = []
        if self._large is not None:
            self._large.fail(refusal)
            self._large = None
        assert self._request is not None
        self._request.body_failed(refusal)

    def _keep_for_later(self, data: bytes) -> None:
        self._stash += data
        if len(self._stash) > self.server.limits.pipelined_bytes and not self._is_read_paused:
            # While paused, a client that leaves is noticed only by writing to it.
            self._is_read_paused = True
            self.transport.pause_reading()

    # answering

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        handle = self.server.handle
        while True:
            request = self._request
            assert request is not None
            try:
                await handle(request)
            except Refusal as refusal:
                self._answer_refusal(request, refusal)
            except Exception:  # noqa: BLE001 - a bug in a handler costs one request, not the connection's task
                _log.exception("the handler of %s %s failed", request.method, request.path)
                self._answer_refusal(request, Refusal(500, "internal_error", "an error inside the gateway"))
            if not request.is_finished and not self.is_gone:
                _log.error("the handler of %s %s left it unanswered", request.method, request.path)
                self._answer_refusal(request, Refusal(500, "internal_error", "an error inside the gateway"))
            self._request = None
            if self._stash:
                await asyncio.sleep(0)  # a long pipeline must not keep the loop to itself
            if self.is_write_paused:
                self._waiter = loop.create_future()
                await self._waiter  # answers that nobody reads must not pile up
            if self._phase != _BUSY or self.is_gone:
                return
            if self.server.is_draining:
                self._close()
                return
            self._phase = _HEAD
            self.deadline_at = perf_counter() + self.server.limits.idle_s
            if self._stash:
                self._read_stash()
            if self._request is None:
                if self._phase != _HEAD:
                    return  # what was pipelined has been refused
                self._waiter = loop.create_future()
                await self._waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _read_stash(self) -> None:
        data, self._stash = self._stash, b""
        self._read_on()
        self._read_head(data)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a connection's task failed", exc_info=error)
        if self._is_lost:
            self.server.discard(self)
        elif self._phase < _LINGERING:
            self.transport.abort()  # cancelled from outside

    def _answer_refusal(self, request: Request, refusal: Refusal) -> None:
        if request.is_started:
            request.abort()
            return
        headers, body = self.server.refuse(
            refusal.status, refusal.code, refusal.message, request.path.encode()
        )
        request.respond(refusal.status, headers, body)

    def _refuse(self, refusal: Refusal, path: bytes = b"") -> None:
        """Answers what is not (yet) a request, and closes."""
        headers, body = self.server.refuse(refusal.status, refusal.code, refusal.message, path)
        tail = b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        if refusal.status == 503 and all(name != b"retry-after" for name, _ in headers):
            tail = b"retry-after: 1\r\n" + tail
        self.write(answer_head(refusal.status, self.server.date_line, headers, tail) + body)
        self._linger()

    def write(self, data: bytes) -> None:
        """Everything that is sent goes this way, or it would overtake what waits."""
        self.server.outbox.write(self.transport, data)

    def may_keep_alive(self) -> bool:
        return self._phase == _BUSY and not self.server.is_draining

    def invite_body(self) -> None:
        self._body_started_at = perf_counter()
        self.deadline_at = self._body_started_at + self.server.limits.body_s
        self.write(_CONTINUE)

    def end_after_answer(self) -> None:
        """Closes once the answer that was just written is sent."""
        if self._phase == _BUSY and not self._stash:
            self._close()
        else:
            self._linger()

    def break_off(self, *, with_reset: bool) -> None:
        if with_reset:
            # A body that ends with the connection is complete at a FIN; only a reset says that it is not.
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._close()

    # ending

    def cancel_handler(self) -> None:
        if self._task is not None and self._request is not None and not self._request.is_finished:
            self._task.cancel()

    def close_if_idle(self) -> None:
        if self._phase == _HEAD and not self._stash:
            self._close()

    def expire(self, now: float) -> None:
        """The deadline has passed; which one it was follows from the phase."""
        phase = self._phase
        unsent = self.transport.get_write_buffer_size()
        if unsent and phase != _LINGERING:
            if self._unsent_bytes and unsent >= self._unsent_bytes:
                self.transport.abort()  # the client has stopped reading
                return
            self._unsent_bytes = unsent
            self.deadline_at = now + self.server.limits.write_stall_s
        elif phase == _HEAD and self._stash:
            self._refuse(
                Refusal(408, "request_timeout", "the head of the request did not arrive in time"),
                claimed_path(self._stash),
            )
        elif phase == _HEAD:
            self._close()
        elif phase == _BODY:
            self._give_up_body(
                Refusal(408, "request_timeout", "the body of the request did not arrive in time")
            )
        elif phase >= _LINGERING:
            self.transport.abort()
        else:
            self.deadline_at = inf

    def _close(self) -> None:
        """Closes after what is written has been sent."""
        if self._phase != _CLOSING:
            self._phase = _CLOSING
            self.server.outbox.flush()
            self._unsent_bytes = self.transport.get_write_buffer_size()
            self.deadline_at = perf_counter() + self.server.limits.write_stall_s
            self.transport.close()

    def _linger(self) -> None:
        if self._phase < _LINGERING:
            self._phase = _LINGERING
            self._left_bytes = LINGER_BYTES
            self.deadline_at = perf_counter() + LINGER_S
            self._large = None
            self._read_on()
            self.server.outbox.flush()
            self.transport.write_eof()

    def _lose(self) -> None:
        if self.is_gone:
            return
        self.is_gone = True
        request = self._request
        if request is not None:
            request.lose()
        if self._task is not None and (request is None or not request.is_finished):
            self._task.cancel()
