"""`/v1/chat/completions`: the request as vLLM reads it, the answer as vLLM writes it.

Owns that dialect's fields and chunks. Knows no HTTP and no engine.
"""

from typing import Any, Final

import msgspec

from local_engine.simulator import FINGERPRINT
from local_engine.simulator.driver import Event, Tally
from local_engine.simulator.engine import FinishReason
from local_engine.simulator.generation import (
    ApiError,
    Common,
    Generation,
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
from local_engine.simulator.reply import DONE, Label, Said, openai_usage, running_usage, sse


class Message(msgspec.Struct):
    role: str
    content: str | list[Any] | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None

    def turn(self) -> Turn:
        calls = compact(self.tool_calls) if self.tool_calls else ""
        return Turn(self.role, text_of(self.content) + calls)


class Function(msgspec.Struct):
    name: str
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct):
    function: Function


class Request(Common, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None


class _RawTools(msgspec.Struct):
    """Tools as they were written: every field of theirs is part of the prompt."""

    tools: list[Any] | None = None


_REQUEST: Final = msgspec.json.Decoder(Request)
_RAW_TOOLS: Final = msgspec.json.Decoder(_RawTools)


def prompt_of(messages: list[Message], tools: Any = None) -> list[int]:
    return render([message.turn() for message in messages], tools)


class ChatReply:
    """One chat completion."""

    def __init__(self, body: bytes, served: Served, label: Label) -> None:
        request = decode(_REQUEST, body)
        if not request.messages:
            raise refuse("`messages` must not be empty.", "messages")
        turns = [message.turn() for message in request.messages]
        sampling = request.sampling(
            request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        )
        wish = _wish(request)
        options = request.stream_options or {}
        if options and not request.stream:
            raise refuse("`stream_options` are only allowed when `stream` is true.", "stream_options")
        tools = decode(_RAW_TOOLS, body).tools if request.tools else None
        self.generation = Generation(
            prompts=[render(turns, tools)],
            saying=saying_for(wish, sampling, turns),
            sampling=sampling,
            stream=bool(request.stream),
            include_usage=bool(options.get("include_usage")),
            continuous_usage=bool(options.get("include_usage") and options.get("continuous_usage_stats")),
            is_tool_named=wish.tool_choice == "named",
        )
        check(self.generation.prompts, sampling, request.model, served)
        self._label = label
        self._is_open = False
        self._calling: set[int] = set()  # choices that made a tool call
        self._sent_tokens = 0

    def begin(self) -> bytes:
        return b""

    def event(self, event: Event) -> bytes:
        self._sent_tokens += 1
        opening = b""
        if not self._is_open:
            self._is_open = True
            delta = {"role": "assistant", "content": ""}
            opening = b"".join(self._chunk(n, delta, None) for n in range(self.generation.sampling.n))
        delta_now = self._delta(event)
        if delta_now is None and event.finish is None:
            return opening
        return opening + self._chunk(event.choice, delta_now or {}, event.finish)

    def end(self, tally: Tally) -> bytes:
        if not self.generation.include_usage:
            return DONE
        return sse({**self._head(), "choices": [], "usage": openai_usage(tally, has_created=True)}) + DONE

    def failure(self, error: ApiError) -> bytes:
        return sse(error.body()) + DONE

    def whole(self, choices: list[Said], tally: Tally) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self._label.key}",
            "object": "chat.completion",
            "created": self._label.created_time,
            "model": self._label.model,
            "choices": [self._choice(number, said) for number, said in enumerate(choices)],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": openai_usage(tally, has_created=True),
        }

    def _choice(self, number: int, said: Said) -> dict[str, Any]:
        calls = [
            {
                "id": self._label.tool_call_id(number, index),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for index, (name, arguments) in enumerate(said.calls)
        ]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": said.text if said.text or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        finish = self._finish(said.finish, is_calling=bool(calls))
        return {"index": number, "message": message, "logprobs": None, "finish_reason": finish}

    def _delta(self, event: Event) -> dict[str, Any] | None:
        piece = event.piece
        match piece.kind:
            case "text":
                return {"content": piece.text}
            case "call":
                self._calling.add(event.choice)
                start = {
                    "index": piece.call,
                    "id": self._label.tool_call_id(event.choice, piece.call),
                    "type": "function",
                    "function": {"name": piece.text, "arguments": ""},
                }
                return {"tool_calls": [start]}
            case "arguments":
                if not piece.text:
                    return None
                return {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.text}}]}

    def _chunk(self, choice: int, delta: dict[str, Any], finish: FinishReason | None) -> bytes:
        reason = self._finish(finish, is_calling=choice in self._calling) if finish else None
        chunk = {
            **self._head(),
            "choices": [{"index": choice, "delta": delta, "logprobs": None, "finish_reason": reason}],
        }
        if self.generation.continuous_usage:
            chunk["usage"] = running_usage(len(self.generation.prompts[0]), self._sent_tokens)
        return sse(chunk)

    def _head(self) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self._label.key}",
            "object": "chat.completion.chunk",
            "created": self._label.created_time,
            "model": self._label.model,
            "system_fingerprint": FINGERPRINT,
        }

    def _finish(self, finish: FinishReason, *, is_calling: bool) -> str:
        if finish == "stop" and is_calling and not self.generation.is_tool_named:
            return "tool_calls"
        return finish


def _wish(request: Request) -> Wish:
    wish = request.wish()
    wish.tools = {tool.function.name: tool.function.parameters for tool in request.tools or ()}
    match request.tool_choice:
        case None | "auto":
            pass
        case "none":
            wish.tool_choice = "none"
        case "required":
            wish.tool_choice = "required"
        case {"function": {"name": str(name)}}:
            wish.tool_choice, wish.tool_name = "named", name
        case other:
            raise refuse(f"`tool_choice` {other!r} is not understood.", "tool_choice")
    return wish
