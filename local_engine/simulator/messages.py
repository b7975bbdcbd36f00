"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's dialect as vLLM serves it.

Owns that dialect's fields, its error envelope and its event sequence. As vLLM's, `message_start` counts the whole
prompt as input and only the last `message_delta` splits off what the cache had. Knows no HTTP and no engine.
"""

from typing import Any, Final

import msgspec

from local_engine.simulator.driver import Event, Tally
from local_engine.simulator.engine import FinishReason
from local_engine.simulator.generation import (
    ApiError,
    Generation,
    Sampling,
    Served,
    Turn,
    Wish,
    check,
    compact,
    decode,
    refuse,
    render,
    saying_for,
    stop_strings,
    text_of,
)
from local_engine.simulator.reply import DONE, Label, Said, sse

_ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Message(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]]


class Tool(msgspec.Struct):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class CountRequest(msgspec.Struct, kw_only=True):
    messages: list[Message]
    model: str
    system: str | list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    tool_choice: dict[str, Any] | None = None

    def turns(self) -> list[Turn]:
        if not self.messages:
            raise refuse("`messages` must not be empty.", "messages")
        turns = [Turn("system", text_of(self.system))] if self.system else []
        for message in self.messages:
            turns += _turns(message)
        return turns

    def prompt(self, turns: list[Turn]) -> list[int]:
        return render(turns, [msgspec.to_builtins(tool) for tool in self.tools or ()])


class Request(CountRequest, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = False
    output_format: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


_REQUEST: Final = msgspec.json.Decoder(Request)
_COUNT_REQUEST: Final = msgspec.json.Decoder(CountRequest)


def envelope(error: ApiError) -> dict[str, Any]:
    """An error as this dialect tells it."""
    kind = _ERROR_TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def count_tokens(body: bytes, served: Served) -> dict[str, Any]:
    request = decode(_COUNT_REQUEST, body)
    prompt = request.prompt(request.turns())
    check([prompt], Sampling(), request.model, served)
    return {"input_tokens": len(prompt)}


class MessageReply:
    """One message."""

    def __init__(self, body: bytes, served: Served, label: Label) -> None:
        request = decode(_REQUEST, body)
        turns = request.turns()
        sampling = Sampling(max_tokens=request.max_tokens, stops=stop_strings(request.stop_sequences))
        self.generation = Generation(
            prompts=[request.prompt(turns)],
            saying=saying_for(_wish(request), sampling, turns),
            sampling=sampling,
            stream=bool(request.stream),
        )
        check(self.generation.prompts, sampling, request.model, served)
        self._label = label
        self._is_open = False
        self._is_calling = False
        self._finish: FinishReason = "stop"

    def begin(self) -> bytes:
        return b""

    def event(self, event: Event) -> bytes:
        opening = b"" if self._is_open else self._open(event)
        self._is_open = True
        self._finish = event.finish or self._finish
        piece = event.piece
        if not piece.text or piece.kind == "call":
            return opening
        if piece.kind == "text":
            delta = {"type": "text_delta", "text": piece.text}
        else:
            delta = {"type": "input_json_delta", "partial_json": piece.text}
        return opening + _event("content_block_delta", index=0, delta=delta)

    def end(self, tally: Tally) -> bytes:
        delta = {
            "stop_reason": self._stop_reason(self._finish, is_calling=self._is_calling),
            "stop_sequence": None,
        }
        return (
            _event("content_block_stop", index=0)
            + _event("message_delta", delta=delta, usage=_usage(tally))
            + _event("message_stop")
            + DONE
        )

    def failure(self, error: ApiError) -> bytes:
        return sse(envelope(error), "error") + DONE

    def whole(self, choices: list[Said], tally: Tally) -> dict[str, Any]:
        said = choices[0]
        content: list[dict[str, Any]] = [{"type": "text", "text": said.text}] if not said.calls else []
        for index, (name, arguments) in enumerate(said.calls):
            content.append(
                {
                    "type": "tool_use",
                    "id": self._label.tool_call_id(0, index),
                    "name": name,
                    # Cut by max_tokens, arguments are not JSON.
                    "input": msgspec.json.decode(arguments) if said.finish == "stop" else {},
                }
            )
        return {
            **self._message(content),
            "stop_reason": self._stop_reason(said.finish, is_calling=bool(said.calls)),
            "usage": _usage(tally),
        }

    def _open(self, event: Event) -> bytes:
        prompt_tokens = len(self.generation.prompts[0])
        message = {**self._message([]), "usage": {"input_tokens": prompt_tokens, "output_tokens": 0}}
        self._is_calling = event.piece.kind == "call"
        block: dict[str, Any] = {"type": "text", "text": ""}
        if self._is_calling:
            call_id = self._label.tool_call_id(0, event.piece.call)
            block = {"type": "tool_use", "id": call_id, "name": event.piece.text, "input": {}}
        return _event("message_start", message=message) + _event(
            "content_block_start", index=0, content_block=block
        )

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._label.key}",
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self._label.model,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _stop_reason(self, finish: FinishReason, *, is_calling: bool) -> str:
        if finish == "length":
            return "max_tokens"
        return "tool_use" if is_calling else "end_turn"


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)


def _usage(tally: Tally) -> dict[str, Any]:
    """Here the buckets are disjoint: `input_tokens` is what neither came from the cache nor went into it."""
    return {
        "input_tokens": tally.prompt_tokens - tally.cached_tokens - tally.created_cache_tokens,
        "cache_read_input_tokens": tally.cached_tokens,
        "cache_creation_input_tokens": tally.created_cache_tokens,
        "output_tokens": tally.completion_tokens,
    }


def _turns(message: Message) -> list[Turn]:
    """A message's blocks as turns: tool results stand alone, thinking is left out."""
    if isinstance(message.content, str):
        return [Turn(message.role, message.content)]
    turns = []
    texts = []
    for block in message.content:
        match block.get("type"):
            case "tool_result":
                content = block.get("content")
                turns.append(Turn("tool", content if isinstance(content, str) else compact(content)))
            case "tool_use":
                texts.append(compact([block.get("name"), block.get("input")]))
            case "thinking" | "redacted_thinking":
                pass
            case _:
                texts.append(text_of([block]))
    return [*turns, Turn(message.role, "".join(texts))] if texts else turns


def _wish(request: Request) -> Wish:
    wish = Wish(tools={tool.name: tool.input_schema for tool in request.tools or ()})
    shape = request.output_format or (request.output_config or {}).get("format")
    match shape:
        case {"type": "json_schema", "schema": schema}:
            wish.schema = schema
        case None:
            pass
        case other:
            raise refuse(f"`output_format` {other!r} is not understood.", "output_format")
    match request.tool_choice:
        case None | {"type": "auto"}:
            pass
        case {"type": "none"}:
            wish.tool_choice = "none"
        case {"type": "any"}:
            wish.tool_choice = "required"
        case {"type": "tool", "name": str(name)}:
            wish.tool_choice, wish.tool_name = "named", name
        case other:
            raise refuse(f"`tool_choice` {other!r} is not understood.", "tool_choice")
    return wish
