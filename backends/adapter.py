"""A client's request, as one upstream wants it: the bytes of its head and body.

The body is the client's own bytes; members are exchanged by key only where this upstream needs it (its name
for the model, a request for usage, fields it cannot bear). Client headers reach an upstream by the provider's
allow-list only. No I/O; knows neither caller nor price.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from backends.dialect import Dialect
from backends.json_object import JsonObject
from backends.pool import Endpoint

USER_AGENT: Final = "headgate/0.1"
# Passthrough paths are a client's to choose: remember the few that come first, which are the dialects'.
_MAX_HEADS: Final = 32


class Edits(msgspec.Struct, frozen=True):
    """What is changed in a body: top-level members left out, and members set, each as JSON text (`"top_p":1`).

    `reserved` are set, too, and they are what no rule and no client may say to this upstream.
    """

    drops: frozenset[str]
    sets: Mapping[str, bytes]
    reserved: Mapping[str, bytes] = {}


class Encoded(msgspec.Struct, frozen=True):
    """A body ready to send; `strips_usage` when we asked for a usage event that the client did not ask for."""

    body: bytes
    strips_usage: bool


def encode(
    endpoint: Endpoint,
    dialect: Dialect,
    upstream_model: bytes,
    document: JsonObject,
    *,
    is_stream: bool,
    edits: Edits | None = None,
) -> Encoded:
    """The body for this upstream (`upstream_model` is its name as JSON text): the client's own bytes if nothing must change, else its members rejoined.

    Members are copied as they were written, never parsed and printed again: numbers, escapes and unknown fields
    survive. `stream_options` is a request for usage of ours unless the client said `include_usage: false`. What the
    provider cannot bear is left out, whatever `edits` say.
    """
    provider = endpoint.provider
    values = document.values
    wants_usage = is_stream and dialect.usage_on_request and provider.may_ask_usage
    if edits is not None:
        sets = {name: member for name, member in edits.sets.items() if name not in provider.drops}
        sets |= edits.reserved
        return _edited(document, upstream_model, provider.drops | edits.drops, sets, wants_usage=wants_usage)
    if not wants_usage and bytes(values["model"]) == upstream_model and provider.drops.isdisjoint(values):
        return Encoded(document.body, strips_usage=False)
    return _edited(document, upstream_model, provider.drops, {}, wants_usage=wants_usage)


def _edited(
    document: JsonObject, named: bytes, drops: frozenset[str], sets: dict[str, bytes], *, wants_usage: bool
) -> Encoded:
    view = memoryview(document.body)
    parts: list[bytes | memoryview] = []
    is_edited = bool(sets)
    strips_usage = False
    for key, start, value_start, value_end in document.members:
        if key in drops or key in sets:
            is_edited = True
            continue
        if key == "model" and view[value_start:value_end] != named:
            parts.append(b'"model":' + named)
            is_edited = True
            continue
        if key == "stream_options" and wants_usage:
            wants_usage = False
            asked = _ask_usage(bytes(view[value_start:value_end]))
            if asked is not None:
                parts.append(b'"stream_options":' + asked)
                is_edited = strips_usage = True
                continue
        parts.append(view[start:value_end])
    parts += sets.values()
    if wants_usage:
        parts.append(b'"stream_options":{"include_usage":true}')
        is_edited = strips_usage = True
    return Encoded(b"{" + b",".join(parts) + b"}" if is_edited else document.body, strips_usage)


def _ask_usage(options: bytes) -> bytes | None:
    """`stream_options` with usage asked for; None to leave it alone: asked already, refused, or not an object."""
    if options == b"null":
        return b'{"include_usage":true}'
    try:
        fields = msgspec.json.decode(options, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return None  # the upstream says what is wrong with it
    if bytes(fields.get("include_usage", b"null")) != b"null":
        return None
    fields["include_usage"] = msgspec.Raw(b"true")
    return msgspec.json.encode(fields)


def head(
    endpoint: Endpoint,
    method: str,
    path: str,
    headers: Mapping[bytes, bytes],
    body_bytes: int,
    request_id: str,
    content_type: bytes = b"application/json",
) -> bytes:
    """A whole request head. `path` goes after the endpoint's base path; `headers` are the client's.

    An empty `content_type` sends none: a passthrough request without a body.
    """
    start = endpoint.heads.get(path)
    if start is None:
        start = _fixed_head(endpoint, path)
        if len(endpoint.heads) < _MAX_HEADS:
            endpoint.heads[path] = start
    forwarded = b""
    for name, default in endpoint.client_headers:
        value = headers.get(name, default)
        if value is not None:
            forwarded += name + b": " + value + b"\r\n"
    if content_type:
        forwarded += b"content-type: " + content_type + b"\r\n"
    return b"%b%b%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
        method.encode(),
        start,
        forwarded,
        request_id.encode(),
        body_bytes,
    )


def _fixed_head(endpoint: Endpoint, path: str) -> bytes:
    """From the target on: what is the same for every request to this path of this endpoint."""
    provider = endpoint.provider
    lines = [
        f" {endpoint.base_path}{path} HTTP/1.1",
        f"host: {endpoint.connections.origin.authority}",
        f"user-agent: {USER_AGENT}",
        "accept: */*",
        "accept-encoding: identity",
    ]
    lines += (f"{name}: {value}" for name, value in provider.headers.items() if name not in provider.forwards)
    lines += credentials(endpoint)
    if endpoint.rank is not None:
        lines.append(f"x-data-parallel-rank: {endpoint.rank}")  # vLLM; each rank has a cache of its own
    return "\r\n".join([*lines, ""]).encode()


def head_beside(endpoint: Endpoint, method: str, path: str, body_bytes: int = 0) -> bytes:
    """A request head for a page beside the API: `path` goes in the place of its `/v1`. Nothing of a client's."""
    lines = [
        f"{method} {endpoint.base_path.removesuffix('/v1')}{path} HTTP/1.1",
        f"host: {endpoint.connections.origin.authority}",
        f"user-agent: {USER_AGENT}",
        "accept: */*",
        "accept-encoding: identity",
        *credentials(endpoint),
    ]
    if body_bytes:
        lines += ["content-type: application/json", f"content-length: {body_bytes}"]
    return "\r\n".join([*lines, "", ""]).encode()


def credentials(endpoint: Endpoint) -> list[str]:
    """The header lines that say who we are; none for an upstream without keys."""
    auth = endpoint.provider.auth
    if not endpoint.api_key or auth == "none":
        return []
    name, scheme = ("authorization", "Bearer ") if auth == "bearer" else (auth, "")
    return [f"{name}: {scheme}{endpoint.api_key}"]
