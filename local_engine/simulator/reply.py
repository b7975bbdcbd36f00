"""What every dialect does for one API call: read the body, then tell the answer whole or event by event.

Owns that contract and the pieces all dialects share. One `Reply` serves one call. Knows no HTTP and no engine.
"""

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from local_engine.simulator.driver import Event, Tally
from local_engine.simulator.engine import FinishReason
from local_engine.simulator.generation import ApiError, Generation, compact

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Label:
    """What identifies an answer. `key` is the caller's `x-request-id` where there is one, as in vLLM."""

    model: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_time: int = field(default_factory=lambda: int(time.time()))

    def tool_call_id(self, choice: int, call: int) -> str:
        return f"call_{self.key}_{choice}_{call}"


@dataclass(slots=True)
class Said:
    """One choice, gathered."""

    text: str = ""
    calls: list[list[str]] = field(default_factory=list)  # [name, arguments so far]
    finish: FinishReason = "stop"
    tokens: list[int] = field(default_factory=list)


class Reply(Protocol):
    """One call in one dialect."""

    generation: Generation

    def begin(self) -> bytes:
        """What a stream opens with before the first token."""

    def event(self, event: Event) -> bytes:
        """One token on a stream; may be empty."""

    def end(self, tally: Tally) -> bytes:
        """The close of a complete stream."""

    def failure(self, error: ApiError) -> bytes:
        """The close of a stream whose engine went away."""

    def whole(self, choices: list[Said], tally: Tally) -> dict[str, Any]:
        """The unstreamed answer."""


def gather(choices: list[Said], events: Iterable[Event]) -> None:
    """Add events to the choices they belong to."""
    for event in events:
        said = choices[event.choice]
        piece = event.piece
        said.tokens.append(piece.token)
        if piece.kind == "text":
            said.text += piece.text
        elif piece.kind == "call":
            said.calls.append([piece.text, ""])
        else:
            said.calls[-1][1] += piece.text
        if event.finish is not None:
            said.finish = event.finish


def encoded(document: Any) -> bytes:
    """JSON; slower where a request's fields are told again and hold integers too large for orjson."""
    try:
        return orjson.dumps(document)
    except TypeError:
        return compact(document).encode(errors="replace")


def sse(data: Any, event: str | None = None) -> bytes:
    body = encoded(data)
    return b"event: %b\ndata: %b\n\n" % (event.encode(), body) if event else b"data: %b\n\n" % body


def openai_usage(tally: Tally, *, has_created: bool) -> dict[str, Any]:
    """Usage of chat and legacy completions. vLLM reports what it added to the cache for chat only."""
    return {
        "prompt_tokens": tally.prompt_tokens,
        "total_tokens": tally.prompt_tokens + tally.completion_tokens,
        "completion_tokens": tally.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": tally.cached_tokens,
            "created_cache_tokens": tally.created_cache_tokens if has_created else None,
            "multimodal_tokens": None,
        },
    }


def running_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Usage so far (`continuous_usage_stats`), which never has details."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }
