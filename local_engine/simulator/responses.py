"""`/v1/responses`: input items in, output items and named events out.

Owns that dialect's fields and its event sequence. Nothing is stored, as in vLLM without its store: an id is good for
the length of its answer. Knows no HTTP and no engine.
"""

from typing import Any, Final

import msgspec

from local_engine.simulator import FINGERPRINT
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
    text_of,
)
from local_engine.simulator.reply import Label, Said, gather, sse


class Request(msgspec.Struct, kw_only=True):
    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = False
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    seed: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    background: bool | None = False
    previous_response_id: str | None = None
    store: bool | None = True
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = True
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    prompt_cache_key: str | None = None


_REQUEST: Final = msgspec.json.Decoder(Request)


def turns_of(request: Request) -> list[Turn]:
    """The instructions and the input as turns. Items that are not text (reasoning) are left out."""
    turns = [Turn("system", request.instructions)] if request.instructions else []
    if isinstance(request.input, str):
        return [*turns, Turn("user", request.input)]
    for item in request.input:
        kind = item.get("type", "message")
        if kind == "message":
            turns.append(Turn(str(item.get("role", "user")), text_of(item.get("content"))))
        elif kind == "function_call":
            turns.append(Turn("assistant", compact([item.get("name"), item.get("arguments")])))
        elif kind == "function_call_output":
            turns.append(Turn("tool", _output_text(item.get("output"))))
        elif kind != "reasoning":
            raise refuse(f"The simulator does not read input items of type {kind!r}.", "input")
    if not turns:
        raise refuse("`input` must not be empty.", "input")
    return turns


def _output_text(output: Any) -> str:
    return output if isinstance(output, str) else compact(output)


class ResponseReply:
    """One response."""

    def __init__(self, body: bytes, served: Served, label: Label) -> None:
        request = decode(_REQUEST, body)
        if request.previous_response_id is not None:
            message = f"Response with id '{request.previous_response_id}' not found."
            raise ApiError(404, message, kind="NotFoundError", param="previous_response_id")
        if request.background:
            raise refuse("`background` needs a store, which this server does not have.", "background")
        turns = turns_of(request)
        sampling = Sampling(
            max_tokens=request.max_output_tokens,
            seed=request.seed,
            priority=request.priority,
            cache_salt=request.cache_salt,
        )
        self.generation = Generation(
            prompts=[render(turns, request.tools)],
            saying=saying_for(_wish(request), sampling, turns),
            sampling=sampling,
            stream=bool(request.stream),
        )
        check(self.generation.prompts, sampling, request.model, served)
        self._request = request
        self._label = label
        self._number = 0
        self._said = Said()
        self._is_item_open = False

    def begin(self) -> bytes:
        response = self._response("in_progress", [], None)
        return self._event("created", response=response) + self._event("in_progress", response=response)

    def event(self, event: Event) -> bytes:
        opening = b"" if self._is_item_open else self._open_item(event)
        self._is_item_open = True
        gather([self._said], [event])
        piece = event.piece
        if not piece.text or piece.kind == "call":
            return opening
        if piece.kind == "arguments":
            return opening + self._event(
                "function_call_arguments.delta", item_id=self._item_id(), output_index=0, delta=piece.text
            )
        return opening + self._event("output_text.delta", **self._place(), delta=piece.text, logprobs=[])

    def end(self, tally: Tally) -> bytes:
        status = _status(self._said.finish)
        items = self._items(self._said)
        closing = b"".join(self._close_item(item) for item in items)
        response = self._response(status, items, tally)
        return closing + self._event(
            "completed" if status == "completed" else "incomplete", response=response
        )

    def failure(self, error: ApiError) -> bytes:
        response = self._response("failed", [], None)
        response["error"] = {"code": "server_error", "message": error.message}
        return self._event("failed", response=response)

    def whole(self, choices: list[Said], tally: Tally) -> dict[str, Any]:
        return self._response(_status(choices[0].finish), self._items(choices[0]), tally)

    def _open_item(self, event: Event) -> bytes:
        if event.piece.kind == "call":
            item = {**self._call_item([event.piece.text, ""]), "status": "in_progress"}
            return self._event("output_item.added", output_index=0, item=item)
        item = {**self._message_item(""), "status": "in_progress", "content": []}
        added = self._event("output_item.added", output_index=0, item=item)
        return added + self._event("content_part.added", **self._place(), part=_text_part(""))

    def _close_item(self, item: dict[str, Any]) -> bytes:
        if item["type"] == "function_call":
            done = self._event(
                "function_call_arguments.done",
                item_id=item["id"],
                output_index=0,
                name=item["name"],
                arguments=item["arguments"],
            )
            return done + self._event("output_item.done", output_index=0, item=item)
        part = item["content"][0]
        return (
            self._event("output_text.done", **self._place(), text=part["text"], logprobs=[])
            + self._event("content_part.done", **self._place(), part=part)
            + self._event("output_item.done", output_index=0, item=item)
        )

    def _items(self, said: Said) -> list[dict[str, Any]]:
        if said.calls:
            return [self._call_item(call) for call in said.calls]
        return [{**self._message_item(said.text), "status": _status(said.finish)}]

    def _message_item(self, text: str) -> dict[str, Any]:
        return {
            "id": self._item_id(),
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [_text_part(text)],
        }

    def _call_item(self, call: list[str]) -> dict[str, Any]:
        return {
            "id": self._item_id(),
            "type": "function_call",
            "call_id": self._label.tool_call_id(0, 0),
            "name": call[0],
            "arguments": call[1],
            "status": "completed",
        }

    def _item_id(self) -> str:
        return f"item_{self._label.key}"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id(), "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        name = f"response.{kind}"
        data = {"type": name, "sequence_number": self._number, **fields}
        self._number += 1
        return sse(data, name)

    def _response(self, status: str, items: list[dict[str, Any]], tally: Tally | None) -> dict[str, Any]:
        request = self._request
        return {
            "id": f"resp_{self._label.key}",
            "object": "response",
            "created_at": self._label.created_time,
            "status": status,
            "model": self._label.model,
            "output": items,
            "usage": _usage(tally) if tally is not None else None,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": None,
            "service_tier": "default",
            "store": False,
            "temperature": request.temperature,
            "text": request.text or {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "background": False,
            "system_fingerprint": FINGERPRINT,
            **({"user": request.user} if request.user is not None else {}),
        }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(finish: FinishReason) -> str:
    return "completed" if finish == "stop" else "incomplete"


def _usage(tally: Tally) -> dict[str, Any]:
    return {
        "input_tokens": tally.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": tally.cached_tokens,
            "cache_write_tokens": tally.created_cache_tokens,
        },
        "output_tokens": tally.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tally.prompt_tokens + tally.completion_tokens,
    }


def _wish(request: Request) -> Wish:
    functions = [tool for tool in request.tools or () if tool.get("type") == "function"]
    wish = Wish(tools={str(tool.get("name")): tool.get("parameters") for tool in functions})
    shape = (request.text or {}).get("format") or {}
    match shape:
        case {"type": "json_schema", "schema": schema}:
            wish.schema = schema
        case {"type": "json_object"}:
            wish.wants_object = True
        case {"type": "json_schema"}:
            raise refuse("`text.format` of type json_schema needs a `schema`.", "text")
        case _:
            pass
    match request.tool_choice:
        case None | "auto" | {"type": "allowed_tools", "mode": "auto"}:
            pass
        case "none":
            wish.tool_choice = "none"
        case "required" | {"type": "allowed_tools"}:
            wish.tool_choice = "required"
        case {"type": "function", "name": str(name)}:
            wish.tool_choice, wish.tool_name = "named", name
        case other:
            raise refuse(f"`tool_choice` {other!r} is not understood.", "tool_choice")
    return wish
