"""Server-sent events, cut out of a stream of bytes without changing one (WHATWG HTML, section 9.2).

The splitter finds where events end, whatever the line ends and wherever the reads are cut; joined, the pieces
it gives out and its rest are what it was fed. Decoding an event is a separate step, because most are only
passed on. Knows nothing of what events mean.
"""

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

LIMIT_BYTES: Final = 16 * 1024 * 1024
BOM: Final = b"\xef\xbb\xbf"

_LF: Final = 0x0A
_CR: Final = 0x0D
# A line end, then an empty line. Atomic groups: a CRLF is never two line ends.
_END: Final = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LONGEST_END: Final = 4


class Event(NamedTuple):
    """`name` is b"" when the event has none (it is a `message` then)."""

    name: bytes
    data: bytes


class Splitter:
    """Bytes in, whole events out, each with the empty line that ends it.

    Two pieces are not events: a lone LF, the second half of a CRLF whose CR had ended the event before; and an
    event longer than `limit_bytes`, which is cut there so that an endless line cannot fill the memory.
    """

    __slots__ = ("_ended_on_cr", "_limit_bytes", "_pending")

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._pending = bytearray()
        self._ended_on_cr = False

    @property
    def pending_bytes(self) -> int:
        """Length of the event that has not ended yet."""
        return len(self._pending)

    @property
    def is_between_events(self) -> bool:
        """Whether whatever comes next begins an event."""
        return not self._pending and not self._ended_on_cr

    def feed(self, data: bytes) -> list[bytes]:
        events: list[bytes] = []
        if self._ended_on_cr and data:
            self._ended_on_cr = False
            if data[0] == _LF:
                events.append(b"\n")
                data = data[1:]
        if not data:
            return events
        search_from = 0
        if self._pending:
            before = bytes(self._pending[1 - _LONGEST_END :])
            if next(_ends(before + data, 0), None) is None:  # a long event comes in many reads: joined once
                self._keep(data, events)
                return events
            search_from = len(self._pending) - len(before)
            data = b"".join((self._pending, data))
            self._pending.clear()
        start = 0
        for end in _ends(data, search_from):
            events.append(data[start:end])
            start = end
        if start == len(data):
            self._ended_on_cr = data[-1] == _CR
        else:
            self._keep(data[start:], events)
        return events

    def rest(self) -> bytes:
        """What has been fed since the last whole event."""
        return bytes(self._pending)

    def _keep(self, data: bytes, events: list[bytes]) -> None:
        self._pending += data
        if len(self._pending) > self._limit_bytes:
            events.append(bytes(self._pending))
            self._pending.clear()


def _ends(data: bytes, start: int) -> Iterator[int]:
    """The offsets just after each event's end, for ends that begin at or after `start`."""
    if data.find(b"\r") >= 0:
        for match in _END.finditer(data, start):
            yield match.end()
        return
    at = data.find(b"\n\n", start)
    while at >= 0:
        yield at + 2
        at = data.find(b"\n\n", at + 2)


def decode(event: bytes) -> Event | None:
    """An event's name and data, or None if it has no data (a comment, a lone `retry`, an empty line)."""
    name = b""
    lines: list[bytes] = []
    for line in event.removeprefix(BOM).splitlines():
        field, _, value = line.partition(b":")
        if field == b"data":
            lines.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")
    return Event(name, b"\n".join(lines)) if lines else None
