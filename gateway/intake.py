"""The first two stages: identify (headers only, before a byte of body is read) and read.

Fills the Exchange with who asks and for what; keeps the body's bytes as the client wrote them. Knows no
policy beyond the key itself.
"""

import time
from collections.abc import Awaitable, Mapping
from typing import Final
from urllib.parse import parse_qsl

import msgspec

from backends.dialect import RAW
from backends.json_object import JsonObject
from gateway.inbound import Refusal, Request
from gateway.ingress import check_content_type, decode_body, read_fields
from gateway.runtime import Runtime
from gateway.wishes import read_wishes
from policies.exchange import Caller, Exchange
from policies.verdict import Denial

_MAX_TAGS: Final = 8
_MAX_TAG_BYTES: Final = 64

PROBLEMS: Final = {
    "missing": "no key: send `Authorization: Bearer <key>` or `x-api-key: <key>`",
    "unknown": "this key is not known here; check that it was copied whole",
    "expired": "this key has expired; ask for a new one",
    "revoked": "this key was revoked; ask for a new one",
    "blocked": "this key is blocked; ask whoever gave it to you",
    "operator": "this is an operator key; the data plane takes caller keys (`headgate keys create`)",
}


class Message(msgspec.Struct, frozen=True):
    """A request's body. `path` is set for passthrough only: where it goes, after the provider's base path."""

    body: bytes
    document: JsonObject | None
    content_type: bytes = b"application/json"
    path: str = ""


def identify(exchange: Exchange, request: Request, runtime: Runtime) -> Denial | None:
    """The caller, by the key in either of the two headers that clients use."""
    caller = _caller(request.headers, runtime)
    if isinstance(caller, str):
        return Denial(403 if caller == "blocked" else 401, f"key_{caller}", PROBLEMS[caller])
    exchange.caller = caller
    exchange.tags = caller.tags
    return None


def _caller(headers: Mapping[bytes, bytes], runtime: Runtime) -> Caller | str:
    problem: str = "missing"
    bearer = headers.get(b"authorization")
    if bearer is not None and (bearer.startswith(b"Bearer ") or bearer[:7].lower() == b"bearer "):
        found = runtime.keyring.find(bearer[7:].strip())
        if isinstance(found, Caller):
            return found
        problem = found
    token = headers.get(b"x-api-key")
    if token is not None:
        found = runtime.keyring.find(token)
        if isinstance(found, Caller):
            return found
        problem = found
    if problem == "unknown" and (bearer or token or b"").lower().removeprefix(b"bearer ").startswith(
        b"op-hg-"
    ):
        return "operator"
    return problem


def read(
    exchange: Exchange, request: Request, runtime: Runtime, provider: str
) -> Message | Awaitable[Message]:
    """The body, decoded under the limit, and the routed fields. Refusal on anything malformed.

    To be awaited only where the body is not all here, or compressed.
    """
    headers = request.headers
    if b"x-headgate-tags" in headers:
        read_tags(exchange, headers)
    if (
        request.query
        and exchange.dialect is not RAW
        and any(name == "model" for name, _ in parse_qsl(request.query, keep_blank_values=True))
    ):
        raise Refusal(400, "model_in_query", "`model` belongs in the body; a query cannot name another one")
    body = request.body_here
    if body is None or b"content-encoding" in headers:
        return _read_later(exchange, request, runtime, provider)
    return _read_body(exchange, request, body, runtime, provider)


async def _read_later(exchange: Exchange, request: Request, runtime: Runtime, provider: str) -> Message:
    raw = await request.body()
    encoding = request.headers.get(b"content-encoding")
    body = raw if encoding is None else await decode_body(raw, encoding, runtime.body_bytes)
    return _read_body(exchange, request, body, runtime, provider)


def _read_body(exchange: Exchange, request: Request, body: bytes, runtime: Runtime, provider: str) -> Message:
    headers = request.headers
    exchange.body_bytes = len(body)
    if exchange.dialect is RAW:
        exchange.model_name = f"{provider}/*"
        exchange.model = runtime.passthrough.get(provider)
        exchange.read_at = time.perf_counter()
        content_type = headers.get(b"content-type", b"application/octet-stream" if body else b"")
        return Message(body, None, content_type, _passthrough_path(request, provider))
    check_content_type(headers.get(b"content-type"))
    return take_in(exchange, headers, body, runtime, provider)


def take_in(
    exchange: Exchange, headers: Mapping[bytes, bytes], body: bytes, runtime: Runtime, provider: str = ""
) -> Message:
    """The routed fields of a body that is here, of an identified caller's request. Refusal on anything malformed."""
    fields = read_fields(body)
    exchange.model_name = f"{provider}/{fields.model}" if provider else fields.model
    exchange.model = runtime.catalog.find(exchange.model_name)
    exchange.is_stream = fields.stream
    exchange.max_tokens = fields.max_tokens
    exchange.choices = fields.choices
    if runtime.end_users.is_on and exchange.caller is not None:
        exchange.end_user = runtime.end_users.read(exchange.caller, headers, fields.document.values)
    exchange.document = fields.document
    exchange.headers = headers
    exchange.continues = fields.previous_response_id
    read_wishes(exchange, headers, fields, runtime)
    exchange.read_at = time.perf_counter()
    return Message(body, fields.document)


def read_tags(exchange: Exchange, headers: Mapping[bytes, bytes]) -> None:
    """`x-headgate-tags: a, b` adds to the key's own tags, for the ledger."""
    value = headers.get(b"x-headgate-tags")
    if value is None:
        return
    tags = [tag.strip() for tag in value.split(b",") if tag.strip()]
    if len(tags) > _MAX_TAGS or any(len(tag) > _MAX_TAG_BYTES or not tag.isascii() for tag in tags):
        raise Refusal(
            400,
            "invalid_tags",
            f"`x-headgate-tags` takes up to {_MAX_TAGS} ASCII tags of {_MAX_TAG_BYTES} bytes",
        )
    exchange.tags = (*exchange.tags, *(tag.decode() for tag in tags))


def _passthrough_path(request: Request, provider: str) -> str:
    """What follows `/{provider}`, with its query; path tricks that an upstream might resolve are refused."""
    path = request.path[len(provider) + 1 :]
    lowered = path.lower()
    if any(trick in lowered for trick in ("/..", "//", "%2e", "%2f", "%5c", "\\")):
        raise Refusal(400, "invalid_path", "the path may not contain `..`, `//` or encoded dots and slashes")
    return f"{path}?{request.query}" if request.query else path
