"""Request bodies that are not acceptable, and fields that mean nothing or two things at once."""

import json
from typing import NamedTuple

DIALECTS = ("chat", "completions", "embeddings", "responses", "messages", "count_tokens")
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "count_tokens": "/v1/messages/count_tokens",
}


class Vector(NamedTuple):
    """A body and what must be said of it. `code` and `param` are looked at where the envelope has them."""

    body: bytes
    status: int
    code: str
    param: str | None = None


def no_json(body: bytes) -> Vector:
    return Vector(body, 400, "invalid_json")


def bad(param: str, body: bytes) -> Vector:
    return Vector(body, 400, "invalid_field", param)


def of(**fields) -> bytes:
    return json.dumps({"model": "m", **fields}).encode()


# Each for every dialect.
EVERYWHERE = {
    "nothing": no_json(b""),
    "half an object": no_json(b'{"model": "m", "messages": ['),
    "a list": no_json(b'[{"model": "m"}]'),
    "invalid UTF-8": no_json(b'{"model": "m", "x": "\xff\xfe"}'),
    "no model": bad("model", b'{"stream": false}'),
    "a model that is a number": bad("model", b'{"model": 7}'),
    "two models": Vector(b'{"model": "m", "model": "other"}', 400, "invalid_json"),
    "an unknown model": Vector(b'{"model": "nobody/serves-this"}', 404, "model_not_found"),
}
# Once: the reading is the same.
ONCE = {
    "white space": no_json(b"  \r\n\t "),
    "null": no_json(b"null"),
    "a string": no_json(b'"model"'),
    "a number": no_json(b"42"),
    "two objects": no_json(b'{"model": "m"}{"model": "m"}'),
    "words after the object": no_json(b'{"model": "m"} and more'),
    "a comma too many": no_json(b'{"model": "m",}'),
    "single quotes": no_json(b"{'model': 'm'}"),
    "no quotes": no_json(b'{model: "m"}'),
    "a comment": no_json(b'{"model": "m" /* the model */}'),
    "not a number": no_json(b'{"model": "m", "temperature": NaN}'),
    "infinity": no_json(b'{"model": "m", "temperature": -Infinity}'),
    "a number with a leading zero": no_json(b'{"model": "m", "n": 01}'),
    "a line break in a string": no_json(b'{"model": "m", "x": "a\nb"}'),
    "an escape that is none": no_json(b'{"model": "m", "x": "\\q"}'),
    "UTF-16": no_json(of().decode().encode("utf-16")),
    "UTF-8 with a byte order mark": no_json(b"\xef\xbb\xbf" + of()),
    "an overlong encoding": no_json(b'{"model": "m", "x": "\xc0\xaf"}'),
    "half a surrogate in bytes": no_json(b'{"model": "m", "x": "\xed\xa0\x80"}'),
    "a cut character": no_json(b'{"model": "m", "x": "\xe2\x82"}'),
    "ten thousand open brackets": no_json(b'{"model": "m", "x": ' + b"[" * 10_000),
    "ten thousand brackets": no_json(b'{"model": "m", "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    "ten thousand objects in each other": no_json(
        b'{"model": "m", "x": ' + b'{"x":' * 10_000 + b"0" + b"}" * 10_000 + b"}"
    ),
    "five thousand fields": no_json(of(**{f"f{n}": 0 for n in range(5000)})),
    "a form": no_json(b"model=m&messages=hi"),
    "XML": no_json(b"<model>m</model>"),
    "YAML": no_json(b"model: m\n"),
    "a model that is null": bad("model", b'{"model": null}'),
    "a model that is empty": bad("model", of(model="")),
    "a model that is a list": bad("model", of(model=["m"])),
    "a model of a thousand characters": bad("model", of(model="m" * 1000)),
    "a model with a NUL": bad("model", of(model="m\0")),
    "a model with a line break": bad("model", of(model="m\r\nx-other: 1")),
    "a model in two spellings": no_json(b'{"model": "m", "mod\\u0065l": "other"}'),
    "a model in upper case": bad("model", b'{"model": "m", "MODEL": "other"}'),
    "a model with a space after its name": bad("model", b'{"model": "m", "model ": "other"}'),
    "a model with a NUL after its name": bad("model", b'{"model": "m", "model\\u0000x": "other"}'),
    "stream twice": no_json(b'{"model": "m", "stream": false, "stream": true}'),
    "stream that is a string": bad("stream", of(stream="true")),
    "stream that is a number": bad("stream", of(stream=1)),
    "a negative limit": bad("max_tokens", of(max_tokens=-1)),
    "a limit that is a string": bad("max_tokens", of(max_tokens="100")),
    "a limit with a fraction": bad("max_tokens", of(max_tokens=1.5)),
    "a limit beyond 64 bits": bad("max_tokens", b'{"model": "m", "max_tokens": 1%s}' % (b"0" * 30)),
    "a limit in the other field that is a list": bad("max_completion_tokens", of(max_completion_tokens=[1])),
    "stream options that are a list": bad("stream_options", of(stream_options=[])),
    "a cache key that is a number": bad("prompt_cache_key", of(prompt_cache_key=1)),
    "a user that is an object": bad("user", of(user={"name": "a"})),
    "a tier that is a number": bad("service_tier", of(service_tier=1)),
    "a model this key may not use": Vector(of(model="claude"), 403, "model_not_allowed", "model"),
}
# A model that is served, but in another dialect.
ELSEWHERE = {dialect: Vector(of(model="claude"), 400, "dialect_not_supported", "model") for dialect in PATHS}
del ELSEWHERE["messages"], ELSEWHERE["count_tokens"]
