"""How much a request seems to ask for: low, medium or high, from its shape alone.

A guess that reads no meaning: how long it is, how many turns, whether there are tools, code, a schema to keep or an
effort asked for. Costs nothing that grows with the prompt beyond a look at its end. Callers who know better declare it.
"""

from collections.abc import Mapping
from typing import Final

from msgspec import Raw

LEVELS: Final = ("low", "medium", "high")
_FORMAT: Final = ("response_format", "text")
_CONVERSATION: Final = ("messages", "input", "prompt")
_EFFORT: Final = ("reasoning_effort", "reasoning", "thinking")
_NO_EFFORT: Final = (b'"none"', b'"minimal"', b'"disabled"', b'"low"')
_END_BYTES: Final = 16_384


def complexity(values: Mapping[str, Raw], input_tokens: int, turns: int) -> str:
    """One of LEVELS: 0 or 1 point is low, 4 and more are high."""
    points = (input_tokens >= 2_000) + (input_tokens >= 16_000) + (turns >= 8)
    points += _is_given(values, "tools")
    points += any(b'"json_schema"' in _part(values, name, slice(512)) for name in _FORMAT)
    points += any(b"```" in _part(values, name, slice(-_END_BYTES, None)) for name in _CONVERSATION)
    points += 2 * any(_asks_effort(values, name) for name in _EFFORT)
    return LEVELS[0 if points < 2 else 1 if points < 4 else 2]


def _is_given(values: Mapping[str, Raw], name: str) -> bool:
    return _part(values, name, slice(5)) not in (b"", b"null", b"[]")


def _asks_effort(values: Mapping[str, Raw], name: str) -> bool:
    asked = _part(values, name, slice(512))
    return asked not in (b"", b"null") and not any(word in asked for word in _NO_EFFORT)


def _part(values: Mapping[str, Raw], name: str, part: slice) -> bytes:
    return memoryview(values.get(name) or b"")[part].tobytes()
