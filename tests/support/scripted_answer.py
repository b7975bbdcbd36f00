"""One scripted answer: a head, parts to send one socket write each, and the faults between them.

`Answer` is a value; its methods give changed copies, so that a test reads as a sentence:
`Answer.of_events(events).crlf().split(7).reset_after(3)`.
"""

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from tests.support import recordings


@dataclass(frozen=True)
class Pause:
    """Send nothing for a while."""

    seconds: float


@dataclass(frozen=True)
class Hang:
    """Send nothing more until the peer goes away."""


@dataclass(frozen=True)
class Reset:
    """RST: what is in flight may be lost."""


@dataclass(frozen=True)
class Cut:
    """FIN, without the end that the framing promised."""


@dataclass(frozen=True)
class Gate:
    """Wait until the test sets the event."""

    event: asyncio.Event


Part = bytes | Pause | Hang | Reset | Cut | Gate


@dataclass(frozen=True)
class Answer:
    """One answer. Every bytes part goes out in a socket write of its own (and, chunked, a chunk of its own)."""

    parts: tuple[Part, ...] = ()
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    framing: Literal["length", "chunked", "close", "raw"] = (
        "length"  # raw: the parts are all there is, head too
    )
    content_length: int | None = None  # what to claim instead of the truth
    before_head: tuple[Part, ...] = ()

    @classmethod
    def of_json(cls, document: Any, status: int = 200, **headers: str) -> Self:
        """`headers` by keyword, underscores for hyphens."""
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        return cls((body,), status, (("content-type", "application/json"), *_named(headers)))

    @classmethod
    def of_events(cls, events: Iterable[bytes], **headers: str) -> Self:
        return cls(tuple(events), 200, (("content-type", "text/event-stream"), *_named(headers)), "chunked")

    @classmethod
    def of_error(
        cls, status: int, family: str = "openai", fields: dict[str, Any] | None = None, **headers: str
    ) -> Self:
        """An error in its family's envelope; 429s say when to come back unless `headers` say otherwise."""
        if status == 429:
            headers = {"retry_after": "2", "retry_after_ms": "1500"} | headers
        return cls.of_json(recordings.error(status, family, **(fields or {})), status, **headers)

    @classmethod
    def of_bytes(cls, *parts: Part) -> Self:
        """Exactly these bytes for a whole answer, head and all; then the connection closes."""
        return cls(parts, framing="raw")

    def hang_before_head(self) -> Self:
        return replace(self, before_head=(Hang(),))

    def reset_before_head(self) -> Self:
        return replace(self, before_head=(Reset(),))

    def cut_before_head(self) -> Self:
        return replace(self, before_head=(Cut(),))

    def late(self, seconds: float) -> Self:
        """The head comes late."""
        return replace(self, before_head=(Pause(seconds),))

    def hang_after(self, events: int) -> Self:
        return self._broken_off(events, Hang())

    def reset_after(self, events: int) -> Self:
        return self._broken_off(events, Reset())

    def cut_after(self, events: int) -> Self:
        return self._broken_off(events, Cut())

    def ending_after(self, events: int) -> Self:
        """A clean end of the body after some events: no [DONE], no usage, nothing wrong with the framing."""
        return replace(self, parts=self.parts[:events])

    def gate_after(self, events: int, event: asyncio.Event) -> Self:
        return replace(self, parts=(*self.parts[:events], Gate(event), *self.parts[events:]))

    def insert(self, at: int, *parts: Part) -> Self:
        return replace(self, parts=(*self.parts[:at], *parts, *self.parts[at:]))

    def error_after(self, events: int, family: str = "openai", *, done: bool = False) -> Self:
        """An in-band error ends the stream; `done` puts [DONE] after it, as vLLM does."""
        tail = (recordings.error_event(family), *((recordings.DONE,) if done else ()))
        return replace(self, parts=(*self.parts[:events], *tail))

    def trickle(self, seconds: float) -> Self:
        """A pause before every part."""
        return replace(self, parts=tuple(each for part in self.parts for each in (Pause(seconds), part)))

    def split(self, size: int) -> Self:
        """The same bytes in writes of `size`, across events, lines and characters."""
        return replace(self, parts=tuple(_cut_up(b"".join(self.body_parts()), size)))

    def joined(self) -> Self:
        """The same bytes in one write."""
        return replace(self, parts=(b"".join(self.body_parts()),))

    def crlf(self) -> Self:
        return self._mapped(lambda part: part.replace(b"\n", b"\r\n"))

    def with_comments(self) -> Self:
        """A keep-alive comment before every event."""
        return self._mapped(lambda part: b": keep-alive\n\n" + part)

    def without_space(self) -> Self:
        """`data:x` instead of `data: x`."""
        return self._mapped(lambda part: part.replace(b"data: ", b"data:"))

    def with_headers(self, **headers: str) -> Self:
        return replace(self, headers=(*self.headers, *_named(headers)))

    def claiming(self, content_length: int) -> Self:
        """A content-length that is not true."""
        return replace(self, content_length=content_length)

    def framed(self, framing: Literal["length", "chunked", "close"]) -> Self:
        return replace(self, framing=framing)

    def body_parts(self) -> list[bytes]:
        return [part for part in self.parts if isinstance(part, bytes)]

    @property
    def body(self) -> bytes:
        """All body bytes, as a client should see them if nothing breaks off."""
        return b"".join(self.body_parts())

    def _broken_off(self, events: int, end: Part) -> Self:
        return replace(self, parts=(*self.parts[:events], end))

    def _mapped(self, change: Callable[[bytes], bytes]) -> Self:
        return replace(
            self, parts=tuple(change(part) if isinstance(part, bytes) else part for part in self.parts)
        )


def _named(headers: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((name.replace("_", "-"), value) for name, value in headers.items())


def _cut_up(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]
