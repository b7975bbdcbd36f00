"""Answers as upstreams write them, whole and streamed, made from one set of numbers."""

import itertools
import json
from collections.abc import Sequence

from hypothesis import strategies as st

from backends.dialect import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Dialect
from backends.usage import Usage

STREAMED = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)


@st.composite
def usages(draw, dialect: Dialect, largest: int = 500_000) -> Usage:
    """Any usage that the dialect can say."""
    count = st.integers(0, largest)
    fresh, cached, written, output = draw(count), draw(count), draw(count), draw(count)
    reasoning = draw(st.integers(0, output))
    if dialect is MESSAGES:
        return Usage(fresh, cached, written, draw(count), output, reasoning)
    if dialect is RESPONSES:
        return Usage(fresh, cached, written, 0, output, reasoning)
    return Usage(
        fresh,
        cached,
        written,
        0,
        output,
        reasoning,
        draw(st.integers(0, fresh)),
        draw(st.integers(0, cached)),
        draw(st.integers(0, output - reasoning)),
    )


def usage_object(dialect: Dialect, usage: Usage) -> dict:
    if dialect is MESSAGES:
        return {
            "input_tokens": usage.input_tokens,
            "cache_read_input_tokens": usage.cache_read_tokens,
            "cache_creation_input_tokens": usage.cache_write_5m_tokens + usage.cache_write_1h_tokens,
            "cache_creation": {
                "ephemeral_5m_input_tokens": usage.cache_write_5m_tokens,
                "ephemeral_1h_input_tokens": usage.cache_write_1h_tokens,
            },
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
            "service_tier": "standard",
        }
    if dialect is RESPONSES:
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cache_read_tokens,
                "cache_write_tokens": usage.cache_write_5m_tokens,
            },
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.total_tokens,
        }
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cache_read_tokens,
            "cache_write_tokens": usage.cache_write_5m_tokens,
            "audio_tokens": usage.input_audio_tokens + usage.cache_read_audio_tokens,
            "cached_tokens_details": {"audio_tokens": usage.cache_read_audio_tokens},
        },
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": usage.output_audio_tokens,
        },
    }


def whole(dialect: Dialect, usage: Usage, text: str = "", model: str = "m-1", tier: str = "default") -> bytes:
    told = usage_object(dialect, usage)
    if dialect is MESSAGES:
        answer = {
            "type": "message",
            "model": model,
            "content": [{"type": "text", "text": text}],
            "usage": told,
        }
    elif dialect is RESPONSES:
        answer = {"object": "response", "model": model, "service_tier": tier, "output": [text], "usage": told}
    else:
        answer = {"model": model, "choices": [_choice(dialect, text)], "usage": told, "service_tier": tier}
    return json.dumps(answer).encode()


def stream(dialect: Dialect, usage: Usage, texts: Sequence[str] = (), model: str = "m-1") -> list[bytes]:
    """The events of the same answer; of chat and completions with the usage event that was asked for."""
    told = usage_object(dialect, usage)
    if dialect is MESSAGES:
        start = told | {"output_tokens": 1, "output_tokens_details": None}
        documents = [
            {
                "type": "message_start",
                "message": {"type": "message", "model": model, "content": [], "usage": start},
            },
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            *({"type": "content_block_delta", "index": 0, "delta": _block(text)} for text in texts),
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": told},
            {"type": "message_stop"},
        ]
    elif dialect is RESPONSES:
        response = {
            "object": "response",
            "model": model,
            "service_tier": "auto",
            "usage": None,
            "error": None,
        }
        done = response | {"service_tier": "default", "usage": told, "output": ["".join(texts)]}
        documents = [
            {"type": "response.created", "response": response, "sequence_number": 0},
            *({"type": "response.output_text.delta", "item_id": "i", "delta": text} for text in texts),
            {"type": "response.output_text.done", "item_id": "i", "text": "".join(texts)},
            {"type": "response.completed", "response": done},
        ]
    else:
        head = {"id": "c-1", "object": "chunk", "model": model, "service_tier": "default"}
        documents = [
            *(head | {"choices": [_delta(dialect, text)], "usage": None} for text in ("", *texts)),
            head | {"choices": [], "usage": told},
        ]
        return [*map(event, documents), b"data: [DONE]\n\n"]
    return [event(document, document["type"]) for document in documents]


def event(document: dict, name: str = "") -> bytes:
    data = b"data: " + json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
    return b"event: " + name.encode() + b"\n" + data if name else data


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """`data` in reads that end at `places`."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def _choice(dialect: Dialect, text: str) -> dict:
    return {"index": 0, "message": {"content": text}} if dialect is CHAT else {"index": 0, "text": text}


def _delta(dialect: Dialect, text: str) -> dict:
    said = {"delta": {"content": text}} if dialect is CHAT else {"text": text}
    return {"index": 0, **said, "logprobs": None, "finish_reason": None}


def _block(text: str) -> dict:
    return {"type": "text_delta", "text": text}
