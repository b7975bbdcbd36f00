"""Watches one streamed answer go by: its usage, its errors in band, whether it reached its own end.

Bytes go through untouched and at once. The one exception: where the gateway asked for a usage event that the
client did not (chat and legacy completions), that event alone is taken out, and only the part of an event that
is not whole yet is held back for it. Ordinary chunks are recognised without being decoded. What is kept of a
stream is bounded: counters, a small sample, the event under way. Knows no prices.
"""

import re
from typing import Any, Final

import msgspec

from backends.dialect import CHAT, MESSAGES, RAW, RESPONSES, Dialect
from backends.sse import BOM, Splitter, decode
from backends.usage import Usage
from backends.usage_readers import (
    MessageUsage,
    Reading,
    estimate_input,
    read_message,
    read_message_usage,
    read_usage,
)

HOLD_BYTES: Final = 64 * 1024
_SAMPLE_BYTES: Final = 4 * 1024
_ERROR_BYTES: Final = 16 * 1024
_BYTES_PER_TOKEN: Final = 4
_LESSONS: Final = 8

_WHOLE: Final = (b"\n\n", b"\r\n\r\n")
_UNREAD: Final = msgspec.Raw(b"")
_NULL: Final = msgspec.Raw(b"null")
# What an event of interest cannot be without; JSON leaves these spellings open to escapes that nobody writes.
_SIGNS: Final = {
    CHAT.name: (b'"usage"', b"error", b"[DONE]"),
    MESSAGES.name: (b'"usage"', b"error", b"message_stop"),
    RESPONSES.name: (b'"response"', b"error", b'.done"'),
}
_ENDS: Final = frozenset({b'"response.completed"', b'"response.incomplete"', b'"message_stop"'})
_FAILURES: Final = frozenset({b'"error"', b'"response.failed"'})
# Where the text of a chunk begins, in all dialects; a value, so what follows up to the next quote is only text.
_TEXT: Final = re.compile(rb'"(?:content|text|delta|reasoning_content|reasoning|thinking)": ?"')
# Comments and empty lines (and the mark at the very start) before an event's first field.
_PREAMBLE: Final = re.compile(rb"(?:%s)?(?>(?::[^\r\n]*)?(?>\r\n|\n|\r))*" % re.escape(BOM))
# Members of a delta that are not the model's words, or are its words a second time.
_NOT_TEXT: Final = frozenset(
    {"role", "type", "id", "signature", "name", "reasoning_details", "encrypted_content"}
)


class _Fields(msgspec.Struct):
    """What may matter in an event, undecoded: no member's type can make the rest unreadable."""

    type: msgspec.Raw = _UNREAD
    error: msgspec.Raw = _UNREAD
    choices: msgspec.Raw = _UNREAD
    usage: msgspec.Raw = _UNREAD
    x_groq: msgspec.Raw = _UNREAD
    response: msgspec.Raw = _UNREAD
    message: msgspec.Raw = _UNREAD


_fields: Final = msgspec.json.Decoder(_Fields)


class Tap:
    """One streamed answer. Feed it every piece of the body in order, relay what it returns, then `flush`."""

    __slots__ = (
        "_dialect",
        "_foot",
        "_foot_bytes",
        "_head",
        "_is_at_end",
        "_is_between_events",
        "_is_first",
        "_lessons",
        "_other_bytes",
        "_prompt",
        "_relayed_bytes",
        "_sample",
        "_sample_bytes",
        "_shape_bytes",
        "_signs",
        "_splitter",
        "_start",
        "_strips_usage",
        "_text_bytes",
        "_text_events",
        "_took_cr",
        "answer_id",
        "error",
        "model",
        "service_tier",
        "usage",
    )

    def __init__(self, dialect: Dialect, *, strips_usage: bool) -> None:
        self.usage: Usage | None = None  # the last the upstream told of
        self.model = ""
        self.service_tier = ""
        self.answer_id = ""  # what a later request may continue it by
        self.error: bytes | None = None  # the data of the first error in band
        self._dialect = dialect
        self._signs = _SIGNS.get(dialect.name, _SIGNS[CHAT.name])
        self._splitter = Splitter()
        self._is_first = True  # no JSON event has been seen: the first one names the model
        self._is_between_events = False
        self._is_at_end = False
        self._start: MessageUsage | None = None
        self._prompt: Usage | None = None  # input told of before any output
        # taking out usage
        self._strips_usage = strips_usage
        self._relayed_bytes = 0  # of the event under way, when it is too long to be held
        self._took_cr = False
        # the shape of an ordinary chunk: all but its text is constant
        self._head = b"\0"
        self._foot = b""
        self._foot_bytes = 0
        self._shape_bytes = 0
        self._lessons = _LESSONS
        # what came since the last usage
        self._text_bytes = 0
        self._text_events = 0
        self._other_bytes = 0
        self._sample: list[bytes] = []
        self._sample_bytes = 0

    @property
    def is_complete(self) -> bool:
        """The dialect's own end was seen, and no error (vLLM sends `[DONE]` after one)."""
        return self._is_at_end and self.error is None

    def feed(self, data: bytes) -> bytes:
        """What to relay now: nearly always `data` itself."""
        if self._is_between_events:
            # Same bytes around it as a chunk already looked at, and no quote in the text: it holds nothing else.
            if (
                data.startswith(self._head)
                and data.endswith(self._foot)
                and data.find(b'"', len(self._head), -self._foot_bytes) < 0
            ):
                self._text_events += 1
                self._text_bytes += len(data) - self._shape_bytes
                return data
            if data.endswith(_WHOLE) and not self._is_notable(data):
                self._count(data)
                return data
        events = self._splitter.feed(data)
        if self._strips_usage:
            data = self._without_usage(data, events)
        else:
            for event in events:
                self._read(event)
        self._is_between_events = (
            not self._is_first and self._splitter.is_between_events and not self._took_cr
        )
        return data

    def flush(self) -> bytes:
        """At the end of the body: what is still held back. An event that lacks only its empty line counts."""
        rest = self._splitter.rest()
        is_taken = bool(rest) and self._read(rest)
        if not self._strips_usage or self._relayed_bytes:
            return b""
        return rest[: _preamble_bytes(rest)] if is_taken else rest

    def estimate(self, prompt_bytes: int) -> Usage:
        """Usage of a stream that was cut: what the upstream told of, and an estimate of what came after that.

        Output is a token per event with text, or per four bytes of text if that is more. Input is known where the
        dialect tells it first (Messages), else four bytes of the request are a token. Takes milliseconds at most.
        """
        told = self.usage or self._prompt or estimate_input(prompt_bytes)
        return msgspec.structs.replace(told, output_tokens=told.output_tokens + self._untold_tokens())

    def _is_notable(self, data: bytes) -> bool:
        sign, error, end = self._signs
        if data.find(error) >= 0 or data.find(end) >= 0:
            return True
        # OpenAI puts a null usage into every chunk when asked for usage.
        return data.find(sign) >= 0 and data.count(sign) > data.count(b'"usage":null') + data.count(
            b'"usage": null'
        )

    def _count(self, data: bytes) -> None:
        """An ordinary chunk: kept in mind for the estimate, and its shape for the next ones."""
        self._other_bytes += len(data)
        room = _SAMPLE_BYTES - self._sample_bytes
        if room > 0:
            self._sample.append(data[:room])
            self._sample_bytes += len(data)
        if self._lessons:
            self._lessons -= 1
            self._learn(data)

    def _learn(self, data: bytes) -> None:
        text = _TEXT.search(data)
        if text is None or data.find(b"\n\n") != len(data) - 2:  # one event, ended by one empty line
            return
        close = data.find(b'"', text.end())
        if close >= 0 and data[close - 1 : close] != b"\\":
            self._head = data[: text.end()]
            self._foot = data[close:]
            self._foot_bytes = len(self._foot)
            self._shape_bytes = len(self._head) + self._foot_bytes

    def _without_usage(self, data: bytes, events: list[bytes]) -> bytes:
        """What to relay of the new bytes and the held ones: all but usage events and what may become one."""
        splitter = self._splitter
        kept: list[bytes] = []
        for event in events:
            is_rest_of_end = event == b"\n" and self._took_cr
            is_taken = self._read(event) and len(event) <= HOLD_BYTES
            if is_taken:
                kept.append(event[: _preamble_bytes(event)])
            elif not is_rest_of_end:
                kept.append(event[self._relayed_bytes :])
            self._took_cr = is_taken and event.endswith(b"\r")
            self._relayed_bytes = 0
        if splitter.pending_bytes > HOLD_BYTES:
            kept.append(data if self._relayed_bytes else splitter.rest())
            self._relayed_bytes = splitter.pending_bytes
        return kept[0] if len(kept) == 1 else b"".join(kept)

    def _read(self, event: bytes) -> bool:
        """Takes in one whole event. True if it carries usage and nothing else for the client."""
        if not (self._is_first or self._is_notable(event)):
            self._count(event)
            return False
        decoded = decode(event)
        if decoded is None:
            return False
        if decoded.data.strip() == b"[DONE]":
            self._is_at_end = True
            return False
        try:
            fields = _fields.decode(decoded.data)
        except (msgspec.MsgspecError, RecursionError):
            if decoded.name == b"error":
                self._fail(decoded.data)
            return False
        kind = bytes(fields.type)
        if self._is_first:
            self._is_first = False
            if self._dialect is RAW:
                self._signs = _SIGNS[_family_of(kind)]
        if decoded.name == b"error" or kind in _FAILURES or _is_given(fields.error):
            self._fail(decoded.data)
        if kind in _ENDS:
            self._is_at_end = True
        if kind.startswith(b'"response.'):
            if _is_given(fields.response):
                self._take(read_usage(RESPONSES, fields.response))
            elif not kind.endswith(b'.done"'):  # those say again what the deltas said
                self._count(event)
        elif kind.startswith(b'"message_'):
            self._read_message(fields)
        else:
            return self._read_chunk(event, decoded.data, fields)
        return False

    def _read_chunk(self, event: bytes, data: bytes, fields: _Fields) -> bool:
        """Chat and completions. Usage may come in the last chunk, in each, or in one of its own."""
        is_told = self._take(read_usage(CHAT, data))
        if not is_told and _is_given(fields.x_groq):
            is_told = self._take(read_usage(CHAT, fields.x_groq))
        if not is_told:
            self._count(event)
        return (
            bytes(fields.usage).startswith(b"{")
            and bytes(fields.choices).replace(b" ", b"") == b"[]"
            and not _is_given(fields.error)
        )

    def _read_message(self, fields: _Fields) -> None:
        """Messages: the start tells the prompt, the last delta everything."""
        if _is_given(fields.message):
            message = read_message(fields.message)
            if message is not None and message.usage is not None:
                self._start = message.usage
                usage = message.usage.usage()
                if usage is not None and usage.prompt_tokens:
                    self._prompt = msgspec.structs.replace(usage, output_tokens=0, reasoning_tokens=0)
                self._take(Reading(None, message.model or "", message.usage.billed_tier()))
            return
        later = read_message_usage(fields.usage) if _is_given(fields.usage) else None
        if later is not None:
            merged = self._start.replaced_by(later) if self._start is not None else later
            self._start = merged
            self._take(Reading(merged.usage(), "", merged.billed_tier()))

    def _take(self, reading: Reading | None) -> bool:
        """Notes what was read; True if there was usage in it."""
        if reading is None:
            return False
        self.model = reading.model or self.model
        self.service_tier = reading.service_tier or self.service_tier
        self.answer_id = reading.answer_id or self.answer_id
        if reading.usage is None:
            return False
        self.usage = reading.usage
        self._text_bytes = self._text_events = self._other_bytes = 0
        return True

    def _fail(self, data: bytes) -> None:
        if self.error is None:
            self.error = data[:_ERROR_BYTES]

    def _untold_tokens(self) -> int:
        events = float(self._text_events)
        text_bytes = float(self._text_bytes)
        if self._other_bytes:
            seen_bytes, seen_events, seen_text = _measure(b"".join(self._sample))
            if seen_bytes:
                scale = self._other_bytes / seen_bytes
                events += seen_events * scale
                text_bytes += seen_text * scale
            else:
                text_bytes += self._other_bytes  # one event longer than the sample: nearly all of it is text
        return max(round(events), -int(-text_bytes // _BYTES_PER_TOKEN))


def _preamble_bytes(event: bytes) -> int:
    match = _PREAMBLE.match(event)
    return match.end() if match is not None else 0


def _is_given(member: msgspec.Raw) -> bool:
    return member not in (_UNREAD, _NULL)


def _family_of(kind: bytes) -> str:
    """Which dialect's events these are, by the `type` of the first."""
    if kind.startswith(b'"response.'):
        return RESPONSES.name
    return MESSAGES.name if kind.startswith((b'"message_', b'"ping"', b'"content_block_')) else CHAT.name


def _measure(sample: bytes) -> tuple[int, int, int]:
    """Of the whole events in a sample: bytes, events with text, bytes of text."""
    sample_bytes = events = text_bytes = 0
    for event in Splitter().feed(sample):
        sample_bytes += len(event)
        decoded = decode(event)
        if decoded is None:
            continue
        try:
            document = msgspec.json.decode(decoded.data)
        except (msgspec.MsgspecError, RecursionError):
            continue
        if isinstance(document, dict):
            found = _text_in(document.get("delta"))
            choices = document.get("choices")
            for choice in choices if isinstance(choices, list) else ():
                if isinstance(choice, dict):
                    found += _text_in(choice.get("delta")) + _text_in(choice.get("text"))
            text_bytes += found
            events += found > 0
    return sample_bytes, events, text_bytes


def _text_in(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, list):
        return sum(map(_text_in, value))
    if not isinstance(value, dict):
        return 0
    skipped = _NOT_TEXT | {"reasoning"} if value.get("reasoning_content") else _NOT_TEXT
    return sum(_text_in(member) for name, member in value.items() if name not in skipped)
