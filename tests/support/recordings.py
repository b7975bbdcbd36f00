"""Answers as providers send them: whole documents and streams of events, in every dialect.

Built from one set of numbers (`Tokens`), so that a test can say what was used once and expect it in any dialect.
Field for field like recorded traffic, unknown and null fields included: relaying must not lose them.
"""

import base64
import json
import re
import struct
from dataclasses import dataclass
from typing import Any

MODEL = "scripted-1"
CREATED = 1_795_000_000
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Tokens:
    """`prompt` includes what the cache had and took; `output` includes `reasoning`."""

    prompt: int = 25
    output: int = 8
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0


@dataclass(frozen=True)
class ToolCall:
    name: str = "get_weather"
    arguments: str = '{"city":"Paris","days":2}'
    id: str = "call_1"

    def pieces(self) -> list[str]:
        """The arguments as they dribble in: cut inside strings and between any two characters."""
        return [self.arguments[i : i + 5] for i in range(0, len(self.arguments), 5)]


def sse(data: Any, event: str | None = None) -> bytes:
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return (f"event: {event}\n" if event else "").encode() + f"data: {text}\n\n".encode()


def words(text: str) -> list[str]:
    """The text in the pieces it streams in; they join to it."""
    return re.split(r"(?<= )", text)


# Chat completions.


def chat_usage(tokens: Tokens) -> dict[str, Any]:
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.output,
        "total_tokens": tokens.prompt + tokens.output,
        "prompt_tokens_details": {"cached_tokens": tokens.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": tokens.reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def chat(
    text: str | None = "Hello from upstream",
    *,
    tokens: Tokens | None = Tokens(),
    model: str = MODEL,
    tools: tuple[ToolCall, ...] = (),
    reasoning: str | None = None,
    **extra: Any,
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if tools:
        message["tool_calls"] = [
            {"id": t.id, "type": "function", "function": {"name": t.name, "arguments": t.arguments}}
            for t in tools
        ]
    choice = {
        "index": 0,
        "message": message,
        "logprobs": None,
        "finish_reason": "tool_calls" if tools else "stop",
    }
    answer = {
        "id": "chatcmpl-Bx1",
        "object": "chat.completion",
        "created": CREATED,
        "model": model,
        "choices": [choice],
        "service_tier": "default",
        "system_fingerprint": "fp_scripted",
        **extra,
    }
    return answer if tokens is None else {**answer, "usage": chat_usage(tokens)}


def chat_chunk(
    delta: dict[str, Any], finish: str | None = None, *, model: str = MODEL, **extra: Any
) -> bytes:
    return sse(
        {
            "id": "chatcmpl-Bx1",
            "object": "chat.completion.chunk",
            "created": CREATED,
            "model": model,
            "service_tier": "default",
            "system_fingerprint": "fp_scripted",
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
            **extra,
        }
    )


def chat_usage_chunk(tokens: Tokens, *, model: str = MODEL) -> bytes:
    return sse(
        {
            "id": "chatcmpl-Bx1",
            "object": "chat.completion.chunk",
            "created": CREATED,
            "model": model,
            "service_tier": "default",
            "system_fingerprint": "fp_scripted",
            "choices": [],
            "usage": chat_usage(tokens),
        }
    )


def chat_events(
    text: str | None = "Hello from upstream",
    *,
    tokens: Tokens | None = Tokens(),
    model: str = MODEL,
    tools: tuple[ToolCall, ...] = (),
    reasoning: str | None = None,
    usage_in: str = "last",
) -> list[bytes]:
    """`usage_in`: "last" (a chunk of its own), "finish" (the chunk with finish_reason), "every" (cumulative)."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": "", "refusal": None}]
    deltas += [{"reasoning_content": part} for part in words(reasoning or "") if part]
    deltas += [{"content": part} for part in words(text or "") if part]
    for index, tool in enumerate(tools):
        start = {
            "index": index,
            "id": tool.id,
            "type": "function",
            "function": {"name": tool.name, "arguments": ""},
        }
        deltas.append({"tool_calls": [start]})
        deltas += [
            {"tool_calls": [{"index": index, "function": {"arguments": part}}]} for part in tool.pieces()
        ]
    events = []
    for number, delta in enumerate(deltas):
        so_far = Tokens(tokens.prompt, min(number, tokens.output)) if tokens else None
        extra = {"usage": chat_usage(so_far)} if so_far and usage_in == "every" else {}
        events.append(chat_chunk(delta, model=model, **extra))
    at_finish = {"usage": chat_usage(tokens)} if tokens and usage_in in ("finish", "every") else {}
    events.append(chat_chunk({}, "tool_calls" if tools else "stop", model=model, **at_finish))
    if tokens and usage_in == "last":
        events.append(chat_usage_chunk(tokens, model=model))
    return [*events, DONE]


# Legacy completions.


def completion(
    text: str = "Hello from upstream", *, tokens: Tokens | None = Tokens(), model: str = MODEL
) -> dict[str, Any]:
    choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": "stop"}
    answer = {
        "id": "cmpl-Bx1",
        "object": "text_completion",
        "created": CREATED,
        "model": model,
        "choices": [choice],
    }
    return answer if tokens is None else {**answer, "usage": chat_usage(tokens)}


def completion_events(
    text: str = "Hello from upstream", *, tokens: Tokens | None = Tokens(), model: str = MODEL
) -> list[bytes]:
    head = {"id": "cmpl-Bx1", "object": "text_completion", "created": CREATED, "model": model}
    parts = words(text)
    events = [
        sse(
            {
                **head,
                "choices": [
                    {
                        "text": part,
                        "index": 0,
                        "logprobs": None,
                        "finish_reason": "stop" if number == len(parts) - 1 else None,
                    }
                ],
            }
        )
        for number, part in enumerate(parts)
    ]
    if tokens:
        events.append(sse({**head, "choices": [], "usage": chat_usage(tokens)}))
    return [*events, DONE]


# Embeddings.


def embeddings(
    vectors: list[list[float]] | None = None, *, encoding: str = "float", tokens: int = 5, model: str = MODEL
) -> dict[str, Any]:
    """`encoding` base64 is little-endian float32, as the official SDKs ask for."""
    vectors = [[0.25, -0.5, 1.0]] if vectors is None else vectors
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(struct.pack(f"<{len(v)}f", *v)).decode()
            if encoding == "base64"
            else v,
        }
        for index, v in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


# Responses.


def response_usage(tokens: Tokens) -> dict[str, Any]:
    return {
        "input_tokens": tokens.prompt,
        "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": tokens.cache_write},
        "output_tokens": tokens.output,
        "output_tokens_details": {"reasoning_tokens": tokens.reasoning},
        "total_tokens": tokens.prompt + tokens.output,
    }


def response(
    text: str = "Hello from upstream",
    *,
    tokens: Tokens | None = Tokens(),
    model: str = MODEL,
    tools: tuple[ToolCall, ...] = (),
    status: str = "completed",
) -> dict[str, Any]:
    items = [_call_item(tool, index) for index, tool in enumerate(tools)] or [_message_item(text)]
    return {
        "id": "resp_Bx1",
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "max_output_tokens": None,
        "model": model,
        "output": items if status != "in_progress" else [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": response_usage(tokens) if tokens and status != "in_progress" else None,
        "metadata": {},
    }


def _message_item(text: str, status: str = "completed") -> dict[str, Any]:
    part = {"type": "output_text", "annotations": [], "logprobs": [], "text": text}
    return {"id": "msg_Bx1", "type": "message", "status": status, "role": "assistant", "content": [part]}


def _call_item(tool: ToolCall, index: int, arguments: str | None = None) -> dict[str, Any]:
    return {
        "id": f"fc_Bx{index}",
        "type": "function_call",
        "status": "completed" if arguments is None else "in_progress",
        "call_id": tool.id,
        "name": tool.name,
        "arguments": tool.arguments if arguments is None else arguments,
    }


def response_events(
    text: str = "Hello from upstream",
    *,
    tokens: Tokens | None = Tokens(),
    model: str = MODEL,
    tools: tuple[ToolCall, ...] = (),
    end: str = "completed",
) -> list[bytes]:
    """`end`: "completed", "incomplete" or "failed"."""
    started = response(text, tokens=None, model=model, tools=tools, status="in_progress")
    steps: list[tuple[str, dict[str, Any]]] = [
        ("created", {"response": started}),
        ("in_progress", {"response": started}),
    ]
    if tools:
        for index, tool in enumerate(tools):
            steps += _call_steps(tool, index)
    else:
        steps += _text_steps(text)
    ended = response(text, tokens=tokens, model=model, tools=tools, status=end)
    if end == "failed":
        ended["error"] = {"code": "server_error", "message": "The model broke."}
    steps.append((end, {"response": ended}))
    return [
        sse({"type": f"response.{kind}", "sequence_number": number, **fields}, f"response.{kind}")
        for number, (kind, fields) in enumerate(steps)
    ]


def _text_steps(text: str) -> list[tuple[str, dict[str, Any]]]:
    place = {"item_id": "msg_Bx1", "output_index": 0, "content_index": 0}
    item = _message_item(text)
    part = item["content"][0]
    opened = {**item, "status": "in_progress", "content": []}
    return [
        ("output_item.added", {"output_index": 0, "item": opened}),
        ("content_part.added", {**place, "part": {**part, "text": ""}}),
        *[
            ("output_text.delta", {**place, "delta": w, "logprobs": [], "obfuscation": "x7"})
            for w in words(text)
        ],
        ("output_text.done", {**place, "text": text, "logprobs": []}),
        ("content_part.done", {**place, "part": part}),
        ("output_item.done", {"output_index": 0, "item": item}),
    ]


def _call_steps(tool: ToolCall, index: int) -> list[tuple[str, dict[str, Any]]]:
    place = {"item_id": f"fc_Bx{index}", "output_index": index}
    return [
        ("output_item.added", {"output_index": index, "item": _call_item(tool, index, "")}),
        *[("function_call_arguments.delta", {**place, "delta": part}) for part in tool.pieces()],
        ("function_call_arguments.done", {**place, "name": tool.name, "arguments": tool.arguments}),
        ("output_item.done", {"output_index": index, "item": _call_item(tool, index)}),
    ]


# Messages.


def message_usage(tokens: Tokens) -> dict[str, Any]:
    """Anthropic's buckets are disjoint."""
    return {
        "input_tokens": tokens.prompt - tokens.cached - tokens.cache_write,
        "cache_creation_input_tokens": tokens.cache_write,
        "cache_read_input_tokens": tokens.cached,
        "cache_creation": {"ephemeral_5m_input_tokens": tokens.cache_write, "ephemeral_1h_input_tokens": 0},
        "output_tokens": tokens.output,
        "service_tier": "standard",
    }


def message(
    text: str = "Hello from upstream",
    *,
    tokens: Tokens | None = Tokens(),
    model: str = MODEL,
    tools: tuple[ToolCall, ...] = (),
) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    content += [
        {"type": "tool_use", "id": t.id, "name": t.name, "input": json.loads(t.arguments)} for t in tools
    ]
    answer = {
        "id": "msg_Bx1",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": "tool_use" if tools else "end_turn",
        "stop_sequence": None,
    }
    return answer if tokens is None else {**answer, "usage": message_usage(tokens)}


def message_events(
    text: str = "Hello from upstream",
    *,
    tokens: Tokens = Tokens(),
    model: str = MODEL,
    tools: tuple[ToolCall, ...] = (),
) -> list[bytes]:
    """As Anthropic streams: input counts at the start, output counts at the end, a ping in between."""
    opened = {**message("", tokens=None, model=model), "content": [], "stop_reason": None}
    opened["usage"] = {**message_usage(tokens), "output_tokens": 1}
    steps: list[dict[str, Any]] = [{"type": "message_start", "message": opened}]
    blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    if text:
        deltas = [{"type": "text_delta", "text": part} for part in words(text)]
        blocks.append(({"type": "text", "text": ""}, deltas))
    for tool in tools:
        deltas = [{"type": "input_json_delta", "partial_json": part} for part in tool.pieces()]
        blocks.append(({"type": "tool_use", "id": tool.id, "name": tool.name, "input": {}}, deltas))
    for index, (block, deltas) in enumerate(blocks):
        steps.append({"type": "content_block_start", "index": index, "content_block": block})
        steps.append({"type": "ping"})
        steps += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        steps.append({"type": "content_block_stop", "index": index})
    delta = {"stop_reason": "tool_use" if tools else "end_turn", "stop_sequence": None}
    steps.append({"type": "message_delta", "delta": delta, "usage": {"output_tokens": tokens.output}})
    steps.append({"type": "message_stop"})
    return [sse(step, step["type"]) for step in steps]


# Errors.

OPENAI_ERRORS = {
    400: ("invalid_request_error", None, "Unsupported parameter."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    403: ("invalid_request_error", "unsupported_country_region_territory", "Country not supported."),
    404: (
        "invalid_request_error",
        "model_not_found",
        "The model does not exist or you do not have access to it.",
    ),
    409: ("invalid_request_error", "conflict", "The resource was changed meanwhile."),
    413: ("invalid_request_error", "request_too_large", "The request is too large."),
    422: ("invalid_request_error", None, "Could not process the request."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached. Please try again in 2s."),
    500: ("server_error", None, "The server had an error while processing your request."),
    502: ("server_error", None, "Bad gateway."),
    503: ("server_error", "engine_overloaded", "The engine is currently overloaded, please try again later."),
    504: ("server_error", None, "Gateway timeout."),
    529: ("server_error", "overloaded", "Overloaded."),
}
ANTHROPIC_ERRORS = {
    400: ("invalid_request_error", "max_tokens: Field required"),
    401: ("authentication_error", "invalid x-api-key"),
    403: ("permission_error", "Your API key does not have permission to use the specified resource."),
    404: ("not_found_error", "model: scripted-1"),
    409: ("invalid_request_error", "Conflict."),
    413: ("request_too_large", "Request exceeds the maximum size"),
    422: ("invalid_request_error", "Unprocessable."),
    429: ("rate_limit_error", "This request would exceed your organization's rate limit."),
    500: ("api_error", "Internal server error"),
    502: ("api_error", "Bad gateway"),
    503: ("api_error", "Service unavailable"),
    504: ("timeout_error", "Request timed out"),
    529: ("overloaded_error", "Overloaded"),
}


def error(status: int, family: str = "openai", **changes: Any) -> dict[str, Any]:
    """The body of an error answer in its family's envelope; `changes` override fields of the inner object."""
    if family == "anthropic":
        kind, text = ANTHROPIC_ERRORS[status]
        inner = {"type": kind, "message": text, **changes}
        return {"type": "error", "error": inner, "request_id": "req_Bx1"}
    kind, code, text = OPENAI_ERRORS[status]
    return {"error": {"message": text, "type": kind, "param": None, "code": code, **changes}}


def error_event(family: str = "openai") -> bytes:
    """An error in the middle of a stream that began with 200."""
    if family == "anthropic":
        return sse(error(529, "anthropic"), "error")
    return sse(error(500))
