"""What an answer said, kept as it is written, so that it can be said again.

Knows no HTTP beyond status, headers and pieces of a body. Invariant: an answer beyond the limit is not kept in part.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

# Of that one answer only: who asked, what was left of a limit then, how long it took. The cost is not paid twice.
_OF_ITS_TIME: Final = (b"x-request-id", b"request-id", b"x-headgate-overhead-us", b"x-headgate-cost-usd")
_OF_ITS_TIME_PREFIXES: Final = (b"x-ratelimit-", b"anthropic-ratelimit-", b"retry-after")

Headers = Sequence[tuple[bytes, bytes]]


class Recording:
    """One answer, as far as it has been written."""

    __slots__ = ("_headers", "_pieces", "_size_bytes", "is_stream", "limit_bytes", "status")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.status = 0
        self.is_stream = False
        self._headers: Headers = ()
        self._pieces: list[bytes] = []
        self._size_bytes = 0

    @property
    def is_too_large(self) -> bool:
        return self._size_bytes > self.limit_bytes

    @property
    def body(self) -> bytes:
        return b"".join(self._pieces)

    def begin(self, status: int, headers: Headers, *, is_stream: bool) -> None:
        self.status = status
        self.is_stream = is_stream
        self._headers = headers

    def add(self, data: bytes) -> None:
        self._size_bytes += len(data)
        if self._size_bytes <= self.limit_bytes:
            self._pieces.append(data)
        else:
            self._pieces.clear()

    def headers(self) -> bytes:
        """Those that are true of every repetition, as JSON."""
        kept = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self._headers
            if name not in _OF_ITS_TIME and not name.startswith(_OF_ITS_TIME_PREFIXES)
        ]
        return msgspec.json.encode(kept)


def read_headers(kept: bytes) -> list[tuple[bytes, bytes]]:
    """What `Recording.headers` wrote."""
    pairs = msgspec.json.decode(kept, type=list[tuple[str, str]])
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
