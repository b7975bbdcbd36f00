"""One request as the handler sees it, and the writing of its answer.

Owns the bytes of an answer's head and of its chunks. Knows nothing of reading: `gateway.connection` fills a request
in, and hears from it when the answer has ended.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Protocol

from gateway.http_rules import Head, Refusal
from gateway.large_body import LargeBody, pieces_of
from gateway.recording import Recording

if TYPE_CHECKING:
    from gateway.inbound import Server

Headers = Sequence[tuple[bytes, bytes]]

_colon_join: Final = b": ".join

_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class Translation(Protocol):
    """Says an answer in another form than it was made in, while it is written."""

    def whole(self, status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]: ...

    def begin(self, status: int, headers: Headers) -> Headers:
        """The head of a stream."""

    def piece(self, data: bytes) -> bytes: ...

    def rest(self) -> bytes:
        """What was held back until the end."""


class Client(Protocol):
    """What a request asks of the connection it came on. By shape, because what stands in for one in the queue is none."""

    server: "Server"
    peer: str
    is_write_paused: bool

    def may_keep_alive(self) -> bool: ...

    def invite_body(self) -> None: ...

    def write(self, data: bytes) -> None: ...

    def end_after_answer(self) -> None: ...

    def break_off(self, *, with_reset: bool) -> None: ...


class Request:
    """One request and its answer. The answer methods do nothing once the client is gone or the answer has ended."""

    __slots__ = (
        "_body_refusal",
        "_body_waiter",
        "_connection",
        "_head",
        "_is_chunked",
        "_is_open",
        "_keeps_alive",
        "_pause",
        "_resume",
        "body_here",
        "headers",
        "is_finished",
        "is_gone",
        "is_started",
        "large_body",
        "method",
        "path",
        "peer",
        "query",
        "received_at",
        "recording",
        "translation",
    )

    def __init__(self, connection: Client, head: Head, received_at: float) -> None:
        self.method = head.method
        self.path = head.path  # as sent, still percent-encoded
        self.query = head.query
        self.headers = head.headers  # lower-case names; repeated fields joined by ", "
        self.peer = connection.peer
        self.received_at = received_at  # perf_counter, when the head was complete
        self.is_started = False
        self.is_finished = False
        self.is_gone = False
        self._connection = connection
        self._head = head
        self._keeps_alive = head.keeps_alive
        self.body_here: bytes | None = None  # all of it, as sent; None: `body` is to be awaited
        self._body_refusal: Refusal | None = None
        self._body_waiter: asyncio.Future[bytes] | None = None
        self._is_chunked = False
        self._is_open = False  # write() has somewhere to write to
        self.large_body: LargeBody | None = None  # instead of `body`, where it is to be taken piece by piece
        self.recording: Recording | None = None  # of the answer, for those who want it again
        self.translation: Translation | None = None
        self._pause: Callable[[], None] | None = None
        self._resume: Callable[[], None] | None = None

    async def body(self) -> bytes:
        """The whole body as sent (not decompressed). Raises Refusal: too large, too slow, malformed."""
        if self.body_here is not None:
            return self.body_here
        if self._body_refusal is not None:
            raise self._body_refusal
        if self._body_waiter is None:
            self._body_waiter = asyncio.get_running_loop().create_future()
            self.invite_body()
        return await self._body_waiter

    def replace_body(self, body: bytes, content_type: bytes) -> None:
        """From now on this is what was sent: as it is, and whole."""
        self.body_here = body
        self.headers = {**self.headers, b"content-type": content_type}
        self.headers.pop(b"content-encoding", None)

    def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, for paths that take uploads (`Limits.upload_paths`). Raises Refusal as `body` does."""
        return pieces_of(self)

    def invite_body(self) -> None:
        """Sends `100 Continue` to a client that waits for it."""
        if self._head.expects_continue and not self.is_started:
            self._connection.invite_body()

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """The whole answer; `content-length`, `date` and `connection` are added."""
        if self.translation is not None:
            status, headers, body = self.translation.whole(status, headers, body)
        if self.recording is not None:
            self.recording.begin(status, headers, is_stream=False)
            self.recording.add(body)
        length = b"" if status == 204 else b"content-length: %d\r\n" % len(body)
        head = self._begin(status, headers, length)
        self.is_finished = True
        if head:
            self._connection.write(head if self.method == "HEAD" else head + body)
            if not self._keeps_alive:
                self._connection.end_after_answer()

    def start(self, status: int, headers: Headers) -> None:
        """The head of an answer of unknown length, chunked (HTTP/1.0: it ends with the connection)."""
        if self.translation is not None:
            headers = self.translation.begin(status, headers)
        if self.recording is not None:
            self.recording.begin(status, headers, is_stream=True)
        self._is_chunked = self._head.is_http11
        if not self._head.is_http11:
            self._keeps_alive = False
        head = self._begin(status, headers, b"transfer-encoding: chunked\r\n" if self._is_chunked else b"")
        if head:
            self._connection.write(head)
            self._is_open = self.method != "HEAD"

    def write(self, data: bytes) -> None:
        """Sends one chunk, now."""
        if self.translation is not None:
            data = self.translation.piece(data)
        if self.recording is not None:
            self.recording.add(data)
        if self._is_open and data:  # an empty chunk would end the body
            self._connection.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)

    def finish(self) -> None:
        """Ends a started answer as complete."""
        if not self.is_started or self.is_finished:
            return
        if self.translation is not None and (rest := self.translation.rest()):
            translation, self.translation = self.translation, None
            self.write(rest)
            self.translation = translation
        self.is_finished = True
        if self._is_open and self._is_chunked:
            self._connection.write(b"0\r\n\r\n")
        self._is_open = False
        if not self._keeps_alive and not self.is_gone:
            self._connection.end_after_answer()

    def abort(self) -> None:
        """Breaks the answer off: what was written is still sent, but the client sees that the rest is missing."""
        if self.is_finished:
            return
        self.is_started = self.is_finished = True
        self._is_open = False
        if not self.is_gone:
            self._connection.break_off(with_reset=not self._is_chunked)

    def on_backpressure(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        """`pause` is called when the client lags 256 KiB behind (now, if it does), `resume` when it has caught up."""
        self._pause = pause
        self._resume = resume
        if self._connection.is_write_paused and not self.is_gone:
            pause()

    def unheard(self) -> "Request":
        """The same request, as if its client were gone: whatever is answered to it goes nowhere."""
        twin = Request(self._connection, self._head, self.received_at)
        twin.headers, twin.body_here = self.headers, self.body_here
        twin.is_started, twin.is_finished = self.is_started, self.is_finished
        twin.recording, twin.translation = self.recording, self.translation
        twin.lose()
        return twin

    def _begin(self, status: int, headers: Headers, framing: bytes) -> bytes:
        """The head; b"" if there is nobody to send it to."""
        if self.is_started:
            raise RuntimeError("this request has been answered already")
        head = b""
        if not self.is_gone:
            connection = self._connection
            self._keeps_alive = self._keeps_alive and connection.may_keep_alive()
            if not self._keeps_alive:
                framing += b"connection: close\r\n\r\n"
            else:
                framing += b"\r\n" if self._head.is_http11 else b"connection: keep-alive\r\n\r\n"
            head = answer_head(status, connection.server.date_line, headers, framing)
        self.is_started = True
        return head

    def body_ended(self, body: bytes) -> None:
        """For the connection: the body is complete."""
        self.body_here = body
        if self._body_waiter is not None and not self._body_waiter.done():
            self._body_waiter.set_result(body)

    def body_failed(self, refusal: Refusal) -> None:
        """For the connection: there will be no body."""
        self._body_refusal = refusal
        if self._body_waiter is not None and not self._body_waiter.done():
            self._body_waiter.set_exception(refusal)
            self._body_waiter.exception()  # seen: a handler cancelled right now would never look at it

    def lose(self) -> None:
        """For the connection: the client is gone."""
        self.is_gone = True
        self._is_open = False

    def client_lags(self) -> None:
        """For the connection: the client reads slower than the answer comes."""
        if self._pause is not None:
            self._pause()

    def client_caught_up(self) -> None:
        """For the connection: the opposite."""
        if self._resume is not None:
            self._resume()


def answer_head(status: int, date_line: bytes, headers: Headers, tail: bytes) -> bytes:
    """`tail` is the rest of the fields and the blank line. ValueError if a field would break out of its line."""
    fields = b"\r\n".join([*map(_colon_join, headers), b""])
    if fields.count(b"\n") != len(headers) or fields.count(b"\r") != len(headers):
        raise ValueError("a line break inside a header field of the answer")
    status_line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    return b"".join((status_line, date_line, fields, tail))
