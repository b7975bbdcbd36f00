"""`multipart/form-data` (RFC 7578), read piece by piece: the fields of a form, and a file that is never held whole.

Owns the delimiters and the headers of the parts, both bounded. Refuses to know what the fields mean.
"""

import re
from collections.abc import Iterator
from typing import Final, NamedTuple
from urllib.parse import unquote

from gateway.http_rules import Refusal

_HEADERS_BYTES: Final = 8192
_MAX_PARTS: Final = 32
_BOUNDARY: Final = re.compile(
    rb"""multipart/form-data\s*;(?:.*;)?\s*boundary=(?:"([^"\r\n]{1,70})"|([!-~]{1,70}?))\s*(?:;.*)?""",
    re.IGNORECASE,
)
_DISPOSITION: Final = re.compile(rb"(?:^|\r\n)content-disposition:\s*form-data\s*;([^\r\n]*)", re.IGNORECASE)
_PARAMETER: Final = re.compile(
    rb"""\b(name|filename\*?)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;\s]+))""", re.IGNORECASE
)

_PREAMBLE, _HEADERS, _CONTENT, _AFTER, _END = range(5)


class Part(NamedTuple):
    """A part begins. `filename` None: an ordinary field."""

    name: str
    filename: str | None


class FormReader:
    """One form. Refusal when it is not what its content type says."""

    def __init__(self, content_type: bytes | None) -> None:
        match = _BOUNDARY.fullmatch((content_type or b"").strip())
        if match is None:
            raise Refusal(
                415,
                "unsupported_media_type",
                "files are sent as `multipart/form-data` with a boundary: let your HTTP client write the header",
            )
        self._delimiter = b"\r\n--" + (match[1] or match[2])
        self._buffer = b"\r\n"  # before the first part there may be nothing at all
        self._state = _PREAMBLE
        self._parts = 0

    def feed(self, data: bytes) -> Iterator[Part | bytes]:
        """What these bytes bring: a Part, then pieces of its content, the next Part ..."""
        self._buffer += data
        while True:
            state = self._state
            if state in {_PREAMBLE, _CONTENT}:
                found = self._buffer.find(self._delimiter)
                if found < 0:
                    keep = len(self._delimiter) - 1
                    ready, self._buffer = self._buffer[:-keep], self._buffer[-keep:]
                else:
                    ready, self._buffer = self._buffer[:found], self._buffer[found + len(self._delimiter) :]
                    self._state = _AFTER
                if state == _CONTENT and ready:
                    yield ready
                if found < 0:
                    return
            elif state == _AFTER:
                if not self._after_delimiter():
                    return
            elif state == _HEADERS:
                part = self._part()
                if part is None:
                    return
                yield part
            else:
                self._buffer = b""  # what follows the form is nobody's
                return

    def end(self) -> None:
        """There is no more. Refusal when the form is not whole."""
        if self._state != _END:
            raise _malformed("it ends before its last boundary")

    def _after_delimiter(self) -> bool:
        """Another part, or the end of the form; False: too little is here to tell."""
        line, _, _ = self._buffer.partition(b"\r\n")
        if self._buffer.startswith(b"--"):
            self._state = _END
            return True
        if len(line) == len(self._buffer):
            if len(line) > _HEADERS_BYTES:
                raise _malformed("a boundary is followed by something else")
            return False
        if line.strip(b" \t"):
            raise _malformed("a boundary is followed by something else")
        self._buffer = self._buffer[len(line) :]
        self._state = _HEADERS
        return True

    def _part(self) -> Part | None:
        end = self._buffer.find(b"\r\n\r\n")
        if max(end, len(self._buffer) if end < 0 else 0) > _HEADERS_BYTES:
            raise _malformed(f"the headers of a part may take {_HEADERS_BYTES} bytes")
        if end < 0:
            return None
        match = _DISPOSITION.search(self._buffer[: end + 2])
        if match is None:
            raise _malformed("a part has no `Content-Disposition: form-data`")
        self._buffer = self._buffer[end + 4 :]
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise _malformed(f"it may have {_MAX_PARTS} parts")
        self._state = _CONTENT
        return _read_disposition(match[1])


def _read_disposition(text: bytes) -> Part:
    found: dict[bytes, str] = {}
    for name, quoted, bare in _PARAMETER.findall(text):
        value = re.sub(rb"\\([\"\\])", rb"\1", quoted) if quoted else bare
        found.setdefault(name.lower(), value.decode("utf-8", "replace"))
    if b"name" not in found:
        raise _malformed("a part has no name")
    filename = found.get(b"filename")
    if b"filename*" in found:  # RFC 5987, as some clients send it beside the other
        filename = unquote(found[b"filename*"].rpartition("'")[2])
    return Part(found[b"name"], filename)


def _malformed(what: str) -> Refusal:
    return Refusal(400, "invalid_form", f"the form cannot be read: {what}")
