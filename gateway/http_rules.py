"""Which HTTP/1.1 requests the data plane accepts: pure rules over the bytes of a request head and a chunked body.

Owns the request line, the header fields and the message framing (RFC 9112, made stricter: what two parsers could
read differently is refused, never repaired). Knows no sockets and no routes. llhttp judges field syntax and
chunks; the request line is judged here, because llhttp lets RTSP, double spaces and HTTP/0.9 pass.
"""

import re
from functools import lru_cache
from typing import Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

CHUNKED: Final = -1
HEAD_END: Final = b"\r\n\r\n"

_REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) (/[!\"$->@-~]*)(?:\?([!\"$-~]*))? HTTP/1\.([01])\r\n")
_METHOD_SO_FAR = re.compile(rb"[A-Z]{0,20}(?:\Z| (?:\Z|/))")
_PATH = re.compile(rb"[A-Z]{1,20} (/[!\"$->@-~]{0,500})")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_LENGTH = re.compile(rb"\r\ncontent-length: ?([0-9]+)\r\n", re.IGNORECASE)
_MAX_LENGTH_DIGITS: Final = 15
_MAX_KEPT_BYTES: Final = 4096  # of a connection's last head
_HOST = re.compile(rb"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
# Two of these would leave it to chance which one counts.
_SINGLE: Final = frozenset(
    (
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"expect",
        b"host",
        b"transfer-encoding",
        b"x-api-key",
    )
)
_UPGRADE_REFUSED: Final = "protocol upgrades are not supported: send the request without an `Upgrade` header"


class Refusal(Exception):  # noqa: N818 - one of the words of the house, like Denial
    """The request cannot be accepted; `message` tells the client what to change, `param` names a body field."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param


class Head:
    """One request head, accepted. `length` is the body's in bytes, or CHUNKED."""

    __slots__ = (
        "_around_length",
        "_repeats",
        "expects_continue",
        "headers",
        "is_http11",
        "keeps_alive",
        "length",
        "method",
        "path",
        "query",
    )

    def __init__(self, data: bytes, target_limit: int, count_limit: int) -> None:
        """`data` ends with the blank line. Raises Refusal."""
        line = data[: data.find(b"\n") + 1]
        if len(line) > target_limit:
            _check_target_size(line, target_limit)
        self.method, self.path, self.query, self.is_http11 = read_request_line(line)
        self.headers: dict[bytes, bytes] = {}
        self._around_length = b"", b""
        self._repeats = count_limit
        self._read_fields(data)
        headers = self.headers
        if len(headers) > self._repeats:
            raise Refusal(431, "too_many_headers", f"send at most {count_limit} header fields")
        length = headers.get(b"content-length")
        if b"transfer-encoding" in headers:
            self.length = self._read_transfer_encoding()
        elif length is None:
            self.length = 0
        elif length.isdigit() and len(length) <= _MAX_LENGTH_DIGITS:
            self.length = int(length)
        else:
            raise Refusal(400, "invalid_content_length", "`Content-Length` must be a plain number of bytes")
        host = headers.get(b"host")
        if host is None:
            if self.is_http11:
                raise Refusal(400, "invalid_host", "the `Host` header is missing")
        elif not _is_host(host):
            raise Refusal(
                400, "invalid_host", "the `Host` header must be a plain host name or address, and a port"
            )
        if b"upgrade" in headers:
            raise Refusal(400, "upgrade_refused", _UPGRADE_REFUSED)
        self.expects_continue = b"expect" in headers and self._read_expect(headers[b"expect"])
        connection = headers.get(b"connection")
        if connection is None:
            self.keeps_alive = self.is_http11
        else:
            options = [option.strip() for option in connection.lower().split(b",")]
            self.keeps_alive = b"close" not in options and (self.is_http11 or b"keep-alive" in options)
        if self.length and self.method in ("GET", "HEAD", "DELETE"):
            # No meaning is defined for such a body; what follows it cannot be trusted (RFC 9110 section 9.3.1).
            self.keeps_alive = False
        self._note_around_length(data)

    def is_repeated_by(self, data: bytes) -> bool:
        """Whether `data` is this very head with another length of the body; then this is now that head.

        Clients send the same fields over a connection again and again. What differs in a single other byte is read.
        """
        before, after = self._around_length
        if not (before and data.startswith(before) and data.endswith(after)):
            return False
        length = data[len(before) : len(data) - len(after)]
        if not length.isdigit() or len(length) > _MAX_LENGTH_DIGITS:
            return False
        self.length = int(length)
        self.headers = {**self.headers, b"content-length": length}
        return True

    def _note_around_length(self, data: bytes) -> None:
        """What precedes and follows the length of the body."""
        if self.method != "POST" or self.expects_continue or len(data) > _MAX_KEPT_BYTES:
            return
        found = _LENGTH.search(data)
        if found is not None:
            self._around_length = data[: found.start(1)], data[found.end(1) :]

    def _read_fields(self, data: bytes) -> None:
        try:
            HttpRequestParser(self).feed_data(data)
        except HttpParserUpgrade as error:
            raise Refusal(400, "upgrade_refused", _UPGRADE_REFUSED) from error
        except HttpParserError as error:
            if isinstance(error.__context__, Refusal):
                raise error.__context__ from None
            raise Refusal(400, "invalid_header", f"malformed request head: {error}") from error

    def on_header(self, name: bytes, value: bytes) -> None:
        """llhttp's callback."""
        name = name.lower()
        headers = self.headers
        if name not in headers:
            headers[name] = value.rstrip()
            return
        if name in _SINGLE:
            raise Refusal(400, "duplicate_header", f"the header `{name.decode()}` is given twice")
        self._repeats -= 1
        if self._repeats < 0:
            raise Refusal(431, "too_many_headers", "too many header fields")
        headers[name] = b"%b, %b" % (headers[name], value.rstrip())

    def _read_transfer_encoding(self) -> int:
        headers = self.headers
        coding = headers[b"transfer-encoding"].lower()
        if coding != b"chunked" or b"content-length" in headers or not self.is_http11:
            raise Refusal(
                400,
                "invalid_transfer_encoding",
                "`Transfer-Encoding` must be exactly `chunked`, with HTTP/1.1 and without `Content-Length`",
            )
        return CHUNKED

    def _read_expect(self, expectation: bytes) -> bool:
        if not self.is_http11:
            return False  # RFC 9110 section 10.1.1: ignored
        if expectation.lower() != b"100-continue":
            raise Refusal(417, "expectation_failed", "the only `Expect` value supported is `100-continue`")
        return self.length != 0


@lru_cache(maxsize=512)
def read_request_line(line: bytes) -> tuple[str, str, str, bool]:
    """Method, path and query as sent (still percent-encoded), whether it is HTTP/1.1. Raises Refusal."""
    match = _REQUEST_LINE.fullmatch(line)
    if match is not None:
        method, path, query, minor = match.groups(b"")
        return method.decode(), path.decode(), query.decode(), minor == b"1"
    parts = line.rstrip(b"\r\n").split(b" ")
    if len(parts) != 3 or not line.endswith(b"\r\n") or not parts[0].isalpha() or not parts[0].isupper():
        raise Refusal(400, "invalid_request_line", "the request line must read `METHOD /path HTTP/1.1`")
    if parts[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise Refusal(400, "invalid_http_version", "only HTTP/1.1 and HTTP/1.0 are spoken here")
    raise Refusal(
        400,
        "invalid_target",
        "the request target must be a path: it begins with `/`, and `#`, spaces and all but printable ASCII"
        " are percent-encoded in it",
    )


def check_partial_head(data: bytes, seen: int, header_limit: int, target_limit: int) -> None:
    """Refuses early what cannot become an acceptable head, so that garbage need not wait for a deadline.

    So many bytes of it have been checked (`seen`) before.
    """
    newline = data.find(b"\n")
    if newline < 0:
        _check_target_size(data, target_limit)
        if not _METHOD_SO_FAR.match(data):
            raise Refusal(400, "invalid_request_line", "the request line must read `METHOD /path HTTP/1.1`")
        return
    line = data[: newline + 1]
    _check_target_size(line, target_limit)
    read_request_line(line)
    if len(data) > header_limit:
        raise Refusal(431, "headers_too_large", f"request line and headers may take {header_limit} bytes")
    if _BARE_LF.search(data, seen):
        raise Refusal(400, "invalid_header", "header lines must end with CR LF")


def claimed_path(data: bytes) -> bytes:
    """The path a refused request seems to be for (it decides the shape of the error), or b""."""
    match = _PATH.match(data)
    return match[1] if match is not None else b""


def _check_target_size(line: bytes, target_limit: int) -> None:
    if len(line) > target_limit + 32:  # method and version
        raise Refusal(414, "target_too_long", f"the request target may take {target_limit} bytes")


@lru_cache(maxsize=128)
def _is_host(value: bytes) -> bool:
    return len(value) <= 260 and _HOST.fullmatch(value) is not None


def append_piece(pieces: list[bytes | bytearray], data: bytes) -> None:
    """Collects a body; small pieces are merged, so that a drip of single bytes costs single bytes."""
    if len(data) >= 2048:
        pieces.append(data)
    elif pieces and type(pieces[-1]) is bytearray:
        pieces[-1] += data
    else:
        pieces.append(bytearray(data))


class ChunkedBody:
    """A chunked request body. Extensions and trailers are ignored, and bounded."""

    def __init__(self, size_limit: int, framing_limit: int) -> None:
        self.pieces: list[bytes | bytearray] = []
        self.size_bytes = 0
        self.is_complete = False
        self._size_limit = size_limit
        self._framing_limit = framing_limit
        self._framing_bytes = 0  # since the last byte of content
        self._tail = b""  # what was read last, up to 3 bytes
        self._parser = HttpRequestParser(self)
        self._parser.feed_data(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")

    def feed(self, data: bytes) -> bytes:
        """Takes bytes of the body and returns those after its end. Raises Refusal."""
        position = 0
        while position < len(data) and not self.is_complete:
            # A message ends with a blank line; feeding no further than the next one, llhttp (which does not tell
            # where it stands) never begins the message after it.
            end = self._next_blank_line(data, position)
            part = data[position:end]
            self._framing_bytes += len(part)
            try:
                self._parser.feed_data(part)
            except HttpParserError as error:
                raise Refusal(400, "invalid_chunk", f"malformed chunked body: {error}") from error
            if self.size_bytes > self._size_limit:
                raise body_too_large(self._size_limit)
            if self._framing_bytes > self._framing_limit:
                raise Refusal(
                    431,
                    "trailers_too_large",
                    f"chunk extensions and trailers may take {self._framing_limit} bytes",
                )
            self._tail = (self._tail + part[-3:])[-3:]
            position = end
        return data[position:]

    def _next_blank_line(self, data: bytes, position: int) -> int:
        straddling = (self._tail + data[position : position + 3]).find(HEAD_END)
        if straddling >= 0:
            return position + straddling + 4 - len(self._tail)
        found = data.find(HEAD_END, position)
        return found + 4 if found >= 0 else len(data)

    def on_body(self, data: bytes) -> None:
        self._framing_bytes = 0
        self.size_bytes += len(data)
        append_piece(self.pieces, data)

    def on_message_complete(self) -> None:
        self.is_complete = True


def body_too_large(limit_bytes: int) -> Refusal:
    return Refusal(413, "body_too_large", f"the request body may take {limit_bytes} bytes")
