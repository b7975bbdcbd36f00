"""Answers of other dialects in the native form: `response`, `tool_calls`, `usage`, vectors, scores; whole or streamed.

What OpenAI's answer has beyond that stays beside it, as Cloudflare's newer models do: clients of either kind find what
they look for. Owns no envelope and no HTTP.
"""

import math
from typing import Any, Final

import msgspec
from msgspec import Raw

from backends.sse import Splitter, decode
from gateway.workers_ai.envelope import encode, error_of
from gateway.workers_ai.forms import Form

_NULL: Final = Raw(b"null")
_STREAM_ERROR_STATUS: Final = 502


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    function: _Function = msgspec.field(default_factory=_Function)
    index: int = 0


class _Said(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    message: _Said = msgspec.field(default_factory=_Said)
    delta: _Said = msgspec.field(default_factory=_Said)
    text: str | None = None
    finish_reason: str | None = None


class _Vector(msgspec.Struct):
    embedding: list[float]


_choices = msgspec.json.Decoder(list[_Choice]).decode
_vectors = msgspec.json.Decoder(list[_Vector]).decode
_fields = msgspec.json.Decoder(dict[str, Raw]).decode


class UnreadableAnswerError(Exception):
    """An upstream's answer is not what its dialect says."""


def result_of(form: Form, body: bytes) -> Any:
    """What goes into `result`. UnreadableAnswerError when the answer cannot be read."""
    try:
        if form.kind == "response":
            return Raw(body)
        fields = _fields(body)
        if form.kind in {"text", "completion"}:
            return _text(form, fields)
        vectors = [vector.embedding for vector in _vectors(fields["data"])]
        usage = fields.get("usage", _NULL)
        if form.kind == "scores":
            return {"response": _scores(vectors), "usage": usage}
        shape = [len(vectors), len(vectors[0]) if vectors else 0]
        return {"shape": shape, "data": vectors, "pooling": "cls", "usage": usage}
    except (msgspec.DecodeError, KeyError, UnicodeDecodeError) as error:
        raise UnreadableAnswerError(form.kind) from error


def _text(form: Form, fields: dict[str, Raw]) -> dict[str, Any]:
    choices = _choices(fields["choices"])
    first = choices[0] if choices else _Choice()
    said = first.text if form.kind == "completion" else first.message.content
    told: dict[str, Any] = {"response": said}
    if form.is_json and said is not None:
        told["response"] = _parsed(said)
    calls = first.message.tool_calls
    if calls:
        told["tool_calls"] = [_native_call(call.function) for call in calls]
    return {**told, **fields}


def _native_call(function: _Function) -> dict[str, Any]:
    return {"name": function.name, "arguments": _parsed(function.arguments or "{}")}


def _parsed(text: str) -> Any:
    """As JSON where it is: the model may have been cut short."""
    try:
        msgspec.json.decode(text, type=Raw)
        return Raw(text.encode())
    except msgspec.DecodeError:
        return text


def _scores(vectors: list[list[float]]) -> list[dict[str, Any]]:
    """How near each text is to the query: the cosine of their vectors, the nearest first."""
    if not vectors:
        return []
    query = vectors[0]
    scores = [(position, _cosine(query, vector)) for position, vector in enumerate(vectors[1:])]
    scores.sort(key=lambda score: -score[1])
    return [{"id": position, "score": score} for position, score in scores]


def _cosine(one: list[float], other: list[float]) -> float:
    length = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / length if length else 0.0


class NativeStream:
    """One streamed answer. Events are told as they come; calls of tools when the last of them is whole."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._splitter = Splitter()
        self._calls: dict[int, _Function] = {}

    def feed(self, data: bytes) -> bytes:
        if self._form.kind == "response":
            return data
        return b"".join(map(self._told, self._splitter.feed(data)))

    def end(self) -> bytes:
        return self._splitter.rest()

    def _told(self, event: bytes) -> bytes:
        found = decode(event)
        if found is None or not found.data.startswith(b"{"):
            return event  # a comment, or [DONE]
        try:
            fields = _fields(found.data)
            if "error" in fields:
                _, error = error_of(_STREAM_ERROR_STATUS, found.data)
                told: dict[str, Any] = {"success": False, "errors": [error]}
            else:
                told = {**self._chunk(fields), **fields}
        except msgspec.DecodeError:
            return event
        return b"data: " + encode(told) + b"\n\n"

    def _chunk(self, fields: dict[str, Raw]) -> dict[str, Any]:
        choices = _choices(fields.get("choices", Raw(b"[]")))
        if not choices:
            return {"response": ""}
        first = choices[0]
        for call in first.delta.tool_calls or ():
            whole = self._calls.setdefault(call.index, _Function("", ""))
            whole.name = (whole.name or "") + (call.function.name or "")
            whole.arguments = (whole.arguments or "") + (call.function.arguments or "")
        told: dict[str, Any] = {"response": (first.text or first.delta.content) or ""}
        if first.finish_reason and self._calls:
            told["tool_calls"] = [_native_call(self._calls[index]) for index in sorted(self._calls)]
            self._calls.clear()
        return told
