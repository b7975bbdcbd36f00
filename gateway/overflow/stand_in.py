"""A request without a client, for the run of a job: what is answered to it is kept instead of sent.

Owns where a stream is cut into events, and what the first of them says. Refuses to know where they are kept.
"""

import re
import time
from collections.abc import Sequence
from typing import Final, cast

import msgspec

from gateway.http_rules import Head
from gateway.recording import Recording
from gateway.request import Client, Request

Pairs = Sequence[tuple[bytes, bytes]]

# What an answer says of the moment it was made in: whose request it answers, how busy we were, what was left then.
_OF_ITS_TIME: Final = (b"x-request-id", b"request-id", b"x-headgate-overhead-us")
_EVENT_END: Final = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_decode = msgspec.json.Decoder(list[tuple[str, str]]).decode


class _Nobody:
    """The connection of a request that has none."""

    peer = ""
    is_write_paused = False


def stand_in(path: str, headers: dict[bytes, bytes], transcript: "Transcript") -> Request:
    """A POST whose client is gone: its answer is written to the transcript alone."""
    head = Head(b"POST %b HTTP/1.1\r\nhost: queue\r\n\r\n" % path.encode(), 8192, 8)
    head.headers = headers
    request = Request(cast("Client", _Nobody()), head, time.perf_counter())
    request.lose()
    request.recording = transcript
    return request


class Transcript(Recording):
    """An answer as it is written. Of a stream that is journaled it hands out the events since the last time.

    The first of these is the answer's head (`head_event`); the others are the stream's own, each with its blank line.
    """

    __slots__ = ("_is_journaled", "_pending", "_rest", "pairs")

    def __init__(self, limit_bytes: int, *, is_journaled: bool = False) -> None:
        super().__init__(limit_bytes)
        self.pairs: Pairs = ()
        self._is_journaled = is_journaled
        self._pending: list[bytes] = []
        self._rest = b""

    def begin(self, status: int, headers: Pairs, *, is_stream: bool) -> None:
        super().begin(status, headers, is_stream=is_stream)
        self.pairs = headers
        self._is_journaled = self._is_journaled and is_stream
        if self._is_journaled:
            self._pending.append(head_event(status, headers))

    def add(self, data: bytes) -> None:
        super().add(data)
        if not self._is_journaled:
            return
        data = self._rest + data
        start = 0
        for end in _EVENT_END.finditer(data):
            self._pending.append(data[start : end.end()])
            start = end.end()
        self._rest = data[start:]

    def take_events(self, *, is_last: bool = False) -> list[bytes]:
        """The whole ones since the last time; with `is_last` whatever is left of one, too."""
        pending, self._pending = self._pending, []
        if is_last and self._rest:
            pending.append(self._rest)
            self._rest = b""
        return pending

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.pairs if key == name), None)

    def kept_headers(self) -> bytes:
        """Those that are true whenever the answer is read, as JSON."""
        return _encode(self.pairs)


def head_event(status: int, headers: Pairs) -> bytes:
    """What a journal begins with, and each new run in it: status and headers. No event of SSE: those end with a blank line."""
    return b"%d %b" % (status, _encode(headers))


def read_head_event(data: bytes) -> tuple[int, list[tuple[bytes, bytes]]] | None:
    """Of an event that is a head; None: it is the stream's own."""
    if data.endswith((b"\n\n", b"\r\r")) or not data[:3].isdigit():
        return None
    return int(data[:3]), read_kept_headers(data[4:])


def read_kept_headers(kept: bytes) -> list[tuple[bytes, bytes]]:
    """What `Transcript.kept_headers` wrote."""
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in _decode(kept or b"[]")]


def _encode(headers: Pairs) -> bytes:
    kept = [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in headers
        if name not in _OF_ITS_TIME and not name.startswith((b"x-ratelimit-", b"anthropic-ratelimit-"))
    ]
    return msgspec.json.encode(kept)
