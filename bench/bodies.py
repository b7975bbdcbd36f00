"""Request bodies of a given size that look like what agents send: a system prompt, turns of a few KB, code with escapes, tools.

Deterministic: the same arguments give the same bytes.
"""

from __future__ import annotations

import json
from typing import Any

PROSE = (
    "The session keeps its cache on the replica that served it before, so the next turn costs a tenth. "
    'He said "no", then wrote:\n\n```python\nfor row in rows:\n    print(f"{row.id}\\t{row.cost:.6f}")\n```\n'
    "Größe: 12 µs - naïve readers disagree. See https://example.invalid/docs?page=7&part=2 for the rest.\n"
)
TURN_BYTES = 3000


def request_body(model: str, size_bytes: int, *, stream: bool) -> bytes:
    """A chat completion request of about `size_bytes` (within 4 %, never less than 400)."""
    request: dict[str, Any] = {"model": model, "stream": stream, "temperature": 0.7, "max_tokens": 512}
    if stream:
        request["stream_options"] = {"include_usage": True}
    messages: list[dict[str, str]] = []
    request["messages"] = messages
    left = size_bytes - len(encode(request)) - 2
    for turn in range(1_000_000):
        role = "system" if turn == 0 else ("user", "assistant")[turn % 2 == 0]
        empty = len(encode({"role": role, "content": ""})) + 1
        if left <= empty:
            break
        share = left // 3 if turn == 0 else left - empty
        content = text(min(share, TURN_BYTES), turn)
        messages.append({"role": role, "content": content})
        left -= empty + len(encode(content)) - 2
        if left < 64 and turn:
            break
    return encode(request)


def text(size_bytes: int, turn: int) -> str:
    """Text whose JSON form has about `size_bytes`; every turn differs."""
    source = f"[{turn}] " + PROSE * (size_bytes // len(PROSE) + 1)
    ratio = len(encode(PROSE)) / len(PROSE)
    return source[: max(8, int(size_bytes / ratio))]


def encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
