"""The top level of a JSON object: its members undecoded, and where each lies in the bytes.

Owns the walk that lets others exchange single members and copy the rest as it was written. Knows no field names.
Nested values are never parsed into Python objects, so the cost hardly depends on their size.

Invariant: a walk that returns has proven that the keys it lists are all the keys there are, each once. Parsers
disagree on which of two equal keys wins (RFC 8259 section 4), so an object with a duplicate is refused.
"""

import re
from typing import Final, NamedTuple

import msgspec
from msgspec import Raw

# Beyond the most compact form: white space at the top level, escapes in keys, duplicates. Far beyond any real body.
MAX_SLACK_BYTES: Final = 65536

_member = tuple.__new__  # half the price of calling Member
_decode = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_key = msgspec.json.Decoder(str).decode
_KEY = re.compile(rb'[ \t\n\r]*[{,][ \t\n\r]*("[^"\\]*(?:\\.[^"\\]*)*")[ \t\n\r]*:[ \t\n\r]*', re.DOTALL)
_END = re.compile(rb"[ \t\n\r]*\}[ \t\n\r]*\Z")


class Member(NamedTuple):
    """Where a member of the object lies: offsets into the body; `start` is that of the key's opening quote."""

    key: str
    start: int
    value_start: int
    value_end: int


class JsonObject(msgspec.Struct):
    """The top level of a body: its members' values undecoded, and where they lie, found when first asked for."""

    body: bytes
    values: dict[str, Raw]
    _members: list[Member] | None

    @property
    def members(self) -> list[Member]:
        """In the order of the body."""
        if self._members is None:
            self._members = _locate_compact(self.values)
        return self._members


def read_object(body: bytes) -> JsonObject:
    """ValueError (msgspec.DecodeError where it is not JSON, RecursionError where it nests too deeply) if the body
    is anything but an object whose keys are each given once. Strings inside the values are not checked for valid
    UTF-8.
    """
    values = _decode(body)
    # An object without white space is exactly as long as its members. A duplicate key makes the body longer than
    # the members that the decoder kept, and so does anything else: the sum can come out only if there is none of it.
    if sum(map(len, values)) + sum(map(len, values.values())) + 4 * len(values) + 1 == len(body) and values:
        return JsonObject(body, values, None)
    found = _locate_spaced(body, values)
    return JsonObject(body, values, _walk(body, values) if found is None else found)


def members(body: bytes) -> list[Member]:
    """The members of a JSON object in their order. ValueError as `read_object`."""
    return read_object(body).members


def _locate_compact(values: dict[str, Raw]) -> list[Member]:
    """By arithmetic. Only for an object that is known to hold no white space."""
    found: list[Member] = []
    start = 1
    for key, value in values.items():
        value_start = start + len(key) + 3
        value_end = value_start + len(value)
        found.append(_member(Member, (key, start, value_start, value_end)))
        start = value_end + 1
    return found


def _locate_spaced(body: bytes, values: dict[str, Raw]) -> list[Member] | None:
    """The same walk as `_walk` for the separators that Python's json writes by default."""
    found: list[Member] = []
    opening = b'{"'
    position = 0
    for key, value in values.items():
        if not body.startswith(b'%b%b": ' % (opening, key.encode()), position):
            return None
        start = position + len(opening) - 1
        value_start = start + len(key.encode()) + 4
        if not body.startswith(value, value_start):
            return None
        position = value_start + len(value)
        found.append(_member(Member, (key, start, value_start, position)))
        opening = b', "'
    return found if body[position:] in (b"}", b"}\n") else None


def _walk(body: bytes, values: dict[str, Raw]) -> list[Member]:
    least = sum(map(len, values)) + sum(map(len, values.values())) + 4 * len(values) + 1
    if len(body) - least > MAX_SLACK_BYTES:
        raise ValueError("a field is given twice, or more than 64 KiB of white space surround the fields")
    found: list[Member] = []
    unseen = dict(values)
    position = 0
    while match := _KEY.match(body, position):
        literal = match[1]
        key = _decode_key(literal) if b"\\" in literal else literal[1:-1].decode()
        value = unseen.pop(key, None)
        value_start = match.end()
        # `value` is the last one of that key. Where an earlier one differs, the bytes here differ, or what
        # follows is not a separator; where it is equal, the walk stays in step and meets the key again.
        if value is None or not body.startswith(value, value_start):
            raise _given_twice(key)
        position = value_start + len(value)
        found.append(Member(key, match.start(1), value_start, position))
    if found and (unseen or _END.match(body, position) is None):
        raise _given_twice(found[-1].key)
    return found


def _given_twice(key: str) -> ValueError:
    return ValueError(f"the field {key[:100]!r} is given twice")
