"""What a rule changes in a request's body: fields set, capped or left out, where the dialect has them.

Owns which dialect takes which field under which name. What decides the answer's form or the money (`model`, `stream`,
the prompt itself) is nobody's to change here. The body's bytes are edited in `backends.adapter`, by key.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from backends.adapter import Edits
from backends.dialect import Dialect

TOKEN_LIMITS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
FIXED: Final = frozenset(
    {"model", "stream", "stream_options", "messages", "input", "prompt", "system", "instructions"}
)
_ALL: Final = frozenset({"chat", "completions", "responses", "messages"})
_LEGACY: Final = frozenset({"chat", "completions"})
_UNKNOWN: Final = frozenset({"chat", "completions", "responses"})  # Anthropic refuses what it does not know
_TAKEN_BY: Final[Mapping[str, frozenset[str]]] = {
    "temperature": _ALL,
    "top_p": _ALL,
    "top_k": _LEGACY | {"messages"},
    "stop": _LEGACY,
    "stop_sequences": frozenset({"messages"}),
    "seed": _LEGACY,
    "n": _LEGACY,
    "presence_penalty": _LEGACY,
    "frequency_penalty": _LEGACY,
    "priority": _LEGACY | {"embeddings"},
    "service_tier": frozenset({"chat", "responses", "messages"}),
    "reasoning_effort": frozenset({"chat"}),
    "verbosity": frozenset({"chat"}),
    "reasoning": frozenset({"responses"}),
    "text": frozenset({"responses"}),
    "thinking": frozenset({"messages"}),
    "metadata": frozenset({"chat", "responses", "messages"}),
    "user": _UNKNOWN | {"embeddings"},
    "dimensions": frozenset({"embeddings"}),
    "encoding_format": frozenset({"embeddings"}),
}
# The name under which a dialect takes a limit when the request has none; None: as the rule has it.
_LIMIT_NAME: Final[Mapping[str, str | None]] = {
    "chat": None,
    "completions": "max_tokens",
    "messages": "max_tokens",
    "responses": "max_output_tokens",
}
_REQUIRED: Final[Mapping[str, frozenset[str]]] = {"messages": frozenset({"max_tokens"})}
_number: Final = msgspec.json.Decoder(int | float).decode


class Params:
    """One rule's changes, checked by whoever made it: none of FIXED, caps are numbers."""

    __slots__ = ("_caps", "_drops", "_limit", "_sets")

    def __init__(self, sets: Mapping[str, Any], caps: Mapping[str, float], drops: frozenset[str]) -> None:
        self._sets = {name: _member(name, value) for name, value in sets.items()}
        self._caps = {name: cap for name, cap in caps.items() if name not in TOKEN_LIMITS}
        self._limit = next(((name, int(cap)) for name, cap in caps.items() if name in TOKEN_LIMITS), None)
        self._drops = drops

    def edits(self, dialect: Dialect, values: Mapping[str, msgspec.Raw]) -> Edits | None:
        """For this body; None if nothing of it changes."""
        sets = {name: member for name, member in self._sets.items() if _takes(dialect, name)}
        for name, cap in self._caps.items():
            if name in values and _takes(dialect, name) and _exceeds(values[name], cap):
                sets[name] = _member(name, cap)
        if self._limit is not None and dialect.name in _LIMIT_NAME:
            sets |= _limited(dialect, values, *self._limit)
        drops = self._drops.intersection(values) - _REQUIRED.get(dialect.name, frozenset())
        return Edits(drops, sets) if drops or sets else None

    def max_tokens(self, dialect: Dialect, asked: int | None) -> int | None:
        """What the request may generate after the edits."""
        if self._limit is None or dialect.name not in _LIMIT_NAME:
            return asked
        return self._limit[1] if asked is None else min(asked, self._limit[1])


def _limited(dialect: Dialect, values: Mapping[str, msgspec.Raw], name: str, cap: int) -> dict[str, bytes]:
    given = [limit for limit in TOKEN_LIMITS if bytes(values.get(limit) or b"null") != b"null"]
    if not given:
        own = _LIMIT_NAME[dialect.name] or (name if name != "max_output_tokens" else "max_tokens")
        return {own: _member(own, cap)}
    return {limit: _member(limit, cap) for limit in given if _exceeds(values[limit], cap)}


def _takes(dialect: Dialect, name: str) -> bool:
    return dialect.name in _TAKEN_BY.get(name, _UNKNOWN)


def _exceeds(raw: msgspec.Raw, cap: float) -> bool:
    try:
        return bool(_number(raw) > cap)
    except msgspec.DecodeError:
        return False  # the upstream says what is wrong with it


def _member(name: str, value: Any) -> bytes:
    return msgspec.json.encode(name) + b":" + msgspec.json.encode(value)
