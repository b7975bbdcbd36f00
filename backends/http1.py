"""Reads HTTP/1.1 answers, one after the other, out of the bytes of a connection.

Owns framing (interim answers, content-length, chunked, close-delimited and bodiless answers) and the limits that
keep a hostile upstream from filling memory. Refuses to know sockets, clocks and requests. Invariant: whatever the
bytes are, nothing is raised; `error` says what was wrong with them and no more of them are believed.
"""

import re
from functools import lru_cache
from typing import Final

import httptools

from backends.errors import ErrorKind, UpstreamError

MAX_HEADERS: Final = 256
MAX_INTERIM_ANSWERS: Final = 16
# The headers that decide where an answer ends and how long its connection may idle.
_KEEP_ALIVE_TIMEOUT: Final = re.compile(rb"\btimeout\s*=\s*\"?(\d{1,9})", re.IGNORECASE)


class _StopParsingError(Exception):
    """Raised inside a parser callback: the answer is over or refused, the rest is not to be read."""


class AnswerReader:
    """Call `expect` when a request is sent, then `feed` with what arrives and `end_of_input` when nothing more will.

    After each `feed`: `pieces` holds the decoded body bytes it brought (the owner takes and clears them),
    `has_head`, `is_complete` and `error` tell how far the answer is. Pieces come before the error.
    """

    __slots__ = (
        "_dry_bytes",
        "_fields",
        "_interim_answers",
        "_is_announced",
        "_is_close_delimited",
        "_is_head_request",
        "_max_head_bytes",
        "_parser",
        "error",
        "has_head",
        "headers",
        "idle_limit_s",
        "is_complete",
        "is_reusable",
        "on_body",
        "pieces",
        "status",
    )

    def __init__(self, max_head_bytes: int) -> None:
        self.pieces: list[bytes] = []
        # The parser calls list.append itself: no Python frame per chunk.
        self.on_body = self.pieces.append
        self._max_head_bytes = max_head_bytes
        self._parser = httptools.HttpResponseParser(self)
        self.expect(is_head_request=False)

    def expect(self, *, is_head_request: bool) -> None:
        """Forgets the previous answer. The parser itself goes on: it stands at the start of a message."""
        self.status = 0
        self.headers: dict[bytes, bytes] = {}  # by lower-case name; the caller's to keep
        self.has_head = False
        self.is_complete = False
        self.is_reusable = False  # the connection may carry another request after this answer
        self.idle_limit_s: float | None = (
            None  # what the upstream's `keep-alive: timeout` leaves us, if it says one
        )
        self.error: UpstreamError | None = None
        self._fields: list[
            tuple[bytes, bytes]
        ] = []  # of the head being read, later trailers that nobody reads
        self._is_head_request = is_head_request
        self._is_close_delimited = False
        self._interim_answers = 0
        self._is_announced = False  # its first bytes say HTTP/1.x, so that the parser need not be asked
        self._dry_bytes = 0

    @property
    def is_untouched(self) -> bool:
        """No byte of the expected answer has come."""
        return not self._dry_bytes and not self.has_head

    def feed(self, data: bytes) -> None:
        if not self._dry_bytes and not self.has_head:
            self._is_announced = data.startswith((b"HTTP/1.1 ", b"HTTP/1.0 "))
        # Bytes that bring no body are head, chunk framing or trailers: the parser may be keeping them.
        self._dry_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self.is_complete:
                self.is_reusable = False  # bytes after the answer
            else:
                self._refuse("protocol", f"the upstream's answer is not valid HTTP/1.1: {error}")
        if self.pieces:
            self._dry_bytes = 0
        elif self._dry_bytes > self._max_head_bytes and not self.is_complete:
            self._refuse(
                "too_large", f"the head or trailers of the answer exceed {self._max_head_bytes} bytes"
            )

    def end_of_input(self, *, is_clean: bool) -> UpstreamError | None:
        """The connection is over: None if the answer is complete by that, else what is missing.

        `is_clean` is False for a reset, and for a TLS connection cut without its closing alert.
        """
        if self.is_complete or (self._is_close_delimited and is_clean and self.error is None):
            self.is_complete = True
            return None
        if self.error is not None:
            return self.error
        how = "closed" if is_clean else "broke"
        if self.has_head:
            return UpstreamError(
                "incomplete", f"the upstream {how} the connection inside the body of its answer"
            )
        inside = "before it answered" if self.is_untouched else "inside the head of its answer"
        return UpstreamError("reset", f"the upstream {how} the connection {inside}")

    def on_message_begin(self) -> None:
        if self.is_complete:
            raise _StopParsingError

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._skip_interim(status)
            return
        if not self._is_announced:
            version = self._parser.get_http_version()
            if version not in {"1.1", "1.0"}:
                self._stop("protocol", f"the upstream answered in HTTP/{version}; HTTP/1.1 is needed")
        fields = self._fields
        if self._dry_bytes > self._max_head_bytes or len(fields) > MAX_HEADERS:
            self._check_head_size()
        self._fields = []
        self.headers = dict(fields)
        if len(self.headers) != len(fields):
            self.headers = _joined(fields)
        is_framed = self._read_framing()
        self.status = status
        self.has_head = True
        self.is_reusable = self._parser.should_keep_alive()
        if self._is_head_request:
            # The parser cannot be told that no body follows, so it must not see what comes next.
            self.is_complete = True
            self.is_reusable = False
            raise _StopParsingError
        self._is_close_delimited = not is_framed and status not in {204, 304}

    def on_message_complete(self) -> None:
        if self.has_head:  # else it is the end of an interim answer
            self.is_complete = True

    def _skip_interim(self, status: int) -> None:
        """100, 102 and 103 announce an answer; we never ask for another protocol, so 101 is an error."""
        self._interim_answers += 1
        self._is_announced = False  # what follows says its own version
        if status not in {100, 102, 103}:
            self._stop("protocol", f"the upstream sent status {status}, which answers nothing we ask")
        if self._interim_answers > MAX_INTERIM_ANSWERS:
            self._stop("protocol", f"the upstream sent more than {MAX_INTERIM_ANSWERS} interim answers")
        self._fields = []

    def _check_head_size(self) -> None:
        # `feed` bounds a head that comes bit by bit; one that came with its body in a large read is counted here.
        size = sum(len(name) + len(value) + 4 for name, value in self._fields)
        if size > self._max_head_bytes:
            self._stop("too_large", f"the head of the answer exceeds {self._max_head_bytes} bytes")
        if len(self._fields) > MAX_HEADERS:
            self._stop("too_large", f"the answer has more than {MAX_HEADERS} headers")

    def _read_framing(self) -> bool:
        """Whether the head says where the body ends. The parser has already refused contradictions."""
        headers = self.headers
        if b"keep-alive" in headers:
            self.idle_limit_s = _idle_limit_s(headers[b"keep-alive"])
        if b"transfer-encoding" not in headers:
            return b"content-length" in headers
        coding = headers[b"transfer-encoding"]
        if coding.lower() != b"chunked":
            named = coding[:40].decode("latin-1")
            self._stop("protocol", f"the answer's transfer-encoding is {named!r}; only chunked is understood")
        return True

    def _stop(self, kind: ErrorKind, message: str) -> None:
        self._refuse(kind, message)
        raise _StopParsingError

    def _refuse(self, kind: ErrorKind, message: str) -> None:
        self.is_reusable = False
        if self.error is None:
            self.error = UpstreamError(kind, message)


@lru_cache(maxsize=64)
def _idle_limit_s(keep_alive: bytes) -> float | None:
    timeout = _KEEP_ALIVE_TIMEOUT.search(keep_alive)
    # One second for the way there: the upstream's clock started before ours.
    return int(timeout[1]) - 1.0 if timeout else None


def _joined(fields: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """By name; the values of a repeated field as one list (RFC 9110 section 5.3)."""
    headers: dict[bytes, bytes] = {}
    for name, value in fields:
        headers[name] = b"%b, %b" % (headers[name], value) if name in headers else value
    return headers
