"""What a native request asks for, said in another dialect: chat completions, completions, embeddings or responses.

Owns the native fields and where each goes. Every value that has a counterpart is copied as it was written, so that no
number changes. What the answer is to look like in the native form is kept as a Form, which a job can carry. Knows no HTTP.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Raw

from backends.dialect import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Dialect
from gateway.http_rules import Refusal

# Said to the gateway or to the native API; a target has no use for it.
_NOT_SENT: Final = frozenset(
    {"options", "queueRequest", "rejectIfBusy", "external_reference", "requests", "request_id", "lora", "raw"}
    | {"prompt", "text", "contexts", "query", "truncate_inputs", "pooling", "model", "functions"}
)
_MAX_TEXTS: Final = 2048

_encode = msgspec.json.Encoder().encode
_texts = msgspec.json.Decoder(str | list[str]).decode
_tools = msgspec.json.Decoder(list[dict[str, Any]]).decode

Fields = Mapping[str, Raw]


class Form(msgspec.Struct, frozen=True):
    """How the answer is told. `is_json`: what the model said is JSON, and told as such."""

    kind: Literal["text", "completion", "vectors", "scores", "response"]
    is_json: bool = False


class Translated(NamedTuple):
    """A request in another dialect."""

    dialect: Dialect
    body: bytes
    form: Form


class _Context(msgspec.Struct):
    text: str


class _ResponseFormat(msgspec.Struct):
    type: str = ""
    json_schema: Raw = Raw(b"null")


_contexts = msgspec.json.Decoder(list[_Context]).decode
_response_format = msgspec.json.Decoder(_ResponseFormat).decode
_schema = msgspec.json.Decoder(dict[str, Raw]).decode


def read_fields(body: bytes) -> dict[str, Raw]:
    """The fields of a native body. Refusal when it is no JSON object."""
    try:
        return msgspec.json.decode(body or b"{}", type=dict[str, Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, "invalid_json", "the request body must be a JSON object") from error


def translate(model: str, fields: Fields) -> Translated:
    """By the field that holds the input. Refusal when there is none, or it cannot be read."""
    if "messages" in fields:
        return _chat(model, fields, fields["messages"])
    if "prompt" in fields:
        return _prompted(model, fields)
    if "text" in fields:
        return _vectors(model, _read(_texts, fields, "text", "a string, or a list of strings"), "vectors")
    if "contexts" in fields:
        return _compared(model, fields)
    if "input" in fields:
        sent = {"model": _raw(model), **_sent(fields)}
        return Translated(RESPONSES, _encode(sent), Form("response"))
    raise Refusal(
        400,
        "missing_required_parameter",
        "the input is missing: send `messages`, `prompt`, `text`, `query` with `contexts`, or `input`",
    )


def _prompted(model: str, fields: Fields) -> Translated:
    """A prompt is what a user says, unless it is to be taken as it is."""
    prompt = _read(msgspec.json.Decoder(str).decode, fields, "prompt", "a string")
    if bytes(fields.get("raw", b"")) == b"true":
        sent = {"model": _raw(model), "prompt": fields["prompt"], **_sent(fields)}
        return Translated(COMPLETIONS, _encode(_streaming(sent)), Form("completion"))
    return _chat(model, fields, Raw(_encode([{"role": "user", "content": prompt}])))


def _chat(model: str, fields: Fields, messages: Raw) -> Translated:
    sent = {"model": _raw(model), **_sent(fields), "messages": messages}
    is_json = False
    if "tools" in sent:
        sent["tools"] = _openai_tools(sent["tools"])
    if "response_format" in sent:
        is_json = _wrap_schema(sent)
    return Translated(CHAT, _encode(_streaming(sent)), Form("text", is_json))


def _vectors(model: str, texts: str | list[str], kind: Literal["vectors", "scores"]) -> Translated:
    if len(texts) > _MAX_TEXTS and not isinstance(texts, str):
        raise Refusal(400, "invalid_value", f"send up to {_MAX_TEXTS} texts at a time", "text")
    sent = {"model": model, "input": texts, "encoding_format": "float"}
    return Translated(EMBEDDINGS, _encode(sent), Form(kind))


def _compared(model: str, fields: Fields) -> Translated:
    """Texts held against a query; without one, only their vectors are wanted."""
    contexts = [context.text for context in _read(_contexts, fields, "contexts", "a list of `{text}`")]
    if "query" not in fields:
        return _vectors(model, contexts, "vectors")
    query = _read(msgspec.json.Decoder(str).decode, fields, "query", "a string")
    return _vectors(model, [query, *contexts], "scores")


def _sent(fields: Fields) -> dict[str, Raw]:
    return {name: value for name, value in fields.items() if name not in _NOT_SENT}


def _streaming(sent: dict[str, Raw]) -> dict[str, Raw]:
    """A native stream ends with its usage."""
    if bytes(sent.get("stream", b"")) == b"true" and "stream_options" not in sent:
        sent["stream_options"] = Raw(b'{"include_usage":true}')
    return sent


def _openai_tools(value: Raw) -> Raw:
    """Native tools are functions without the wrapping."""
    try:
        tools = _tools(value)
    except msgspec.DecodeError:
        return value  # whoever reads it says what is wrong
    return Raw(
        _encode(
            [
                tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
                for tool in tools
            ]
        )
    )


def _wrap_schema(sent: dict[str, Raw]) -> bool:
    """A native schema stands bare where OpenAI's has a name. Whether JSON is asked for at all."""
    try:
        wanted = _response_format(sent["response_format"])
        schema = _schema(wanted.json_schema) if wanted.type == "json_schema" else {}
    except msgspec.DecodeError:
        return False
    if wanted.type == "json_schema" and "schema" not in schema:
        wrapped = {"name": "response", "schema": wanted.json_schema}
        sent["response_format"] = Raw(_encode({"type": "json_schema", "json_schema": wrapped}))
    return wanted.type in {"json_object", "json_schema"}


def _raw(text: str) -> Raw:
    return Raw(_encode(text))


def _read(read: Any, fields: Fields, name: str, wanted: str) -> Any:
    try:
        return read(fields[name])
    except msgspec.DecodeError as error:
        raise Refusal(400, "invalid_type", f"`{name}` must be {wanted}", name) from error
