"""A request's body as placement sees it: hashes of its beginnings, and a session where the client named none.

The prompt is read in the order in which an engine reads it: tools, system prompt, then the conversation. Nothing
is decoded: equal bytes are equal text, and a client that repeats a conversation repeats its bytes. Hashing ends
at `PREFIX_CAP_BYTES`, so what it costs does not grow with the prompt beyond that.

A session without a name is recognised by everything up to the end of the first user turn: a system prompt alone
would be that of every session of an agent (sglang#34513), and `messages` alone would make one session of all
Responses requests, which have `input` (sub2api#3127).
"""

import re
from collections.abc import Mapping
from typing import Final

import msgspec
import xxhash

from policies.placement.ask import BEGINNINGS_BYTES, PREFIX_CAP_BYTES

_hash = xxhash.xxh3_64_intdigest

# In the order of a chat template. Each is hashed up to the cap, with its length.
_PREAMBLE: Final = ("tools", "system", "instructions")
_CONVERSATION: Final = ("messages", "input", "prompt")
# Where a first user turn is looked for, once for each beginning that is new.
_SEARCH_BYTES: Final = 1_048_576
_USER: Final = b'"user"'
_BEFORE_ROLE: Final = re.compile(rb'([{,])\s*"role"\s*:\s*\Z')
_ROLE_FIRST: Final = (b'{"role":', b'{"role": ')  # nearly always
_ROLE: Final = b'"role"'
_SPACE: Final = b" \t\r\n"
_LEAD: Final = 40  # bytes before the word that are looked at for its key
_HEAD_BYTES: Final = 16_384  # of what stands before it
_TURN_BYTES: Final = 8192  # of a first user turn; a longer one is told apart by its beginning
_BEGINNING_BYTES: Final = 1024
_MAX_PLACES: Final = 1024
_BETWEEN: Final = _SPACE + b",]"


class Prompt(msgspec.Struct, frozen=True):
    """The parts of a body that are prompt. `conversation` is JSON text."""

    seed: int  # of the preamble; 0 without one
    preamble_bytes: int
    conversation: memoryview


def prompt_of(values: Mapping[str, msgspec.Raw]) -> Prompt | None:
    """None if the body has no prompt that an engine would cache."""
    for name in _CONVERSATION:
        if name in values:
            break
    else:
        return None
    seed = size = 0
    for part in _PREAMBLE:
        if part in values:
            view = memoryview(values[part])
            seed = _hash(view[:PREFIX_CAP_BYTES], seed ^ len(view) ^ len(part))
            size += len(view)
    return Prompt(seed, size, memoryview(values[name]))


def prefixes(prompt: Prompt, scope: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Hashes of the prompt's beginnings and how many bytes each covers, shortest first. `scope` keeps tenants apart."""
    chained = _hash(b"preamble", prompt.seed ^ scope)
    view = prompt.conversation
    length, start = len(view), 0
    hashes = []
    for end in BEGINNINGS_BYTES:
        if end > length:
            break
        chained = _hash(view[start:end], chained)
        hashes.append(chained)
        start = end
    before = prompt.preamble_bytes
    if before < BEGINNINGS_BYTES[0]:
        return tuple(hashes), BEGINNINGS_BYTES[: len(hashes)]
    preamble = _hash(b"preamble", prompt.seed ^ scope)
    return (preamble, *hashes), (before, *(before + end for end in BEGINNINGS_BYTES[: len(hashes)]))


class FirstTurns:
    """Finds the end of the first user turn, and remembers where it was behind the same beginning.

    Behind a shared system prompt it always begins at the same place, so the search is made once for each.
    """

    def __init__(self) -> None:
        self._places: dict[int, int] = {}

    def session(self, prompt: Prompt, scope: int) -> int:
        """64 bits, never 0."""
        text = prompt.conversation
        marker = self._marker(text) if bytes(text[:1]) == b"[" else -1
        if marker < 0:  # plain text, or roles that are not told: all that is hashed
            head, turn = text[:_TURN_BYTES], b""
        else:
            head, turn = text[: min(marker, _HEAD_BYTES)], _turn(text, marker)
        return _hash(turn, _hash(head, prompt.seed ^ scope)) or 1

    def _marker(self, text: memoryview) -> int:
        """Where the role of the first user turn stands; -1: there is none."""
        if len(text) <= 2 * _BEGINNING_BYTES:
            return bytes(text).find(_USER)
        key = _hash(text[:_BEGINNING_BYTES])
        known = self._places.get(key)
        if known is not None and known >= 0 and bytes(text[known : known + len(_USER)]) == _USER:
            return known
        if known == -1 and len(text) > PREFIX_CAP_BYTES:
            return known
        # A quote inside a string is escaped, so this can only be a whole string.
        found = bytes(text[:_SEARCH_BYTES]).find(_USER)
        if len(self._places) >= _MAX_PLACES:
            self._places.clear()
        self._places[key] = found
        return found


def _turn(text: memoryview, marker: int) -> bytes:
    """What the user says in the message whose role is at `marker`, and nothing of the next one.

    The key of the role may come before or after the content: then what is said is what stands before it.
    """
    lead = bytes(text[max(0, marker - _LEAD) : marker])
    if not lead.endswith(_ROLE_FIRST):
        key = _BEFORE_ROLE.search(lead)
        if key is not None and key[1] == b",":
            end = marker - len(lead) + key.start()
            return bytes(text[max(0, end - _TURN_BYTES) : marker])
    return _up_to_next_role(bytes(text[marker : marker + _TURN_BYTES])).rstrip(_BETWEEN)


def _up_to_next_role(turn: bytes) -> bytes:
    at = turn.find(_ROLE)
    while at >= 0:
        before = turn[:at].rstrip(_SPACE)
        after = turn[at + len(_ROLE) : at + _LEAD].lstrip(_SPACE)
        if before.endswith((b"{", b",")) and after.startswith(b":"):
            return before[:-1]
        at = turn.find(_ROLE, at + len(_ROLE))
    return turn
