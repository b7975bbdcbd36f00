"""Every failure, as the client's API would say it. The one place where statuses and envelopes are made.

OpenAI's envelope has four keys, always (`message`, `type`, `param`, `code`); Anthropic's is used on Messages.
A message says what to change. Nothing here comes from an upstream's body: that is relayed, not rewritten.
"""

from typing import Any, Final

import orjson

from backends.dialect import Family
from backends.errors import TIMEOUTS, ErrorKind, UpstreamError
from gateway.limit_headers import refused_details, refused_headers
from policies.verdict import Denial

Headers = list[tuple[bytes, bytes]]

# SDKs sleep so long at most, or try again sooner: a budget that comes back tomorrow is not worth a retry.
WORTH_WAITING_S: Final = 60.0

_OPENAI_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def envelope(
    family: Family, status: int, code: str, message: str, request_id: str, param: str | None = None
) -> bytes:
    """The JSON body of an error."""
    return orjson.dumps(_error(family, status, code, message, request_id, param))


def _error(
    family: Family, status: int, code: str, message: str, request_id: str, param: str | None
) -> dict[str, Any]:
    if family == "anthropic":
        kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
    kind = _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def stream_event(dialect: str, code: str, message: str, request_id: str) -> bytes:
    """An error in band, in the shape each dialect's SDK raises on; the answer's 200 has gone already."""
    if dialect in {"messages", "count_tokens"}:
        return b"event: error\ndata: " + envelope("anthropic", 502, code, message, request_id) + b"\n\n"
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    if dialect == "responses":
        event = {"type": "error", "code": code, "message": message, "param": None, "error": error}
        return b"event: error\ndata: " + orjson.dumps(event) + b"\n\n"
    return b"data: " + orjson.dumps({"error": error}) + b"\n\n"


def answer_headers(family: Family, request_id: str) -> Headers:
    """What every answer carries. Anthropic's SDKs read `request-id`, OpenAI's `x-request-id`."""
    value = request_id.encode()
    if family == "anthropic":
        return [(b"x-request-id", value), (b"request-id", value)]
    return [(b"x-request-id", value)]


def error_headers(
    family: Family, request_id: str, retry_after_s: float | None, *, may_retry: bool = False
) -> Headers:
    """`x-should-retry` is always said: the SDKs retry 408, 409, 429 and 5xx by themselves unless told not to."""
    headers = answer_headers(family, request_id)
    headers.append((b"content-type", b"application/json"))
    if retry_after_s is not None:
        # Rounded up: a client that obeys must not come back a moment too early.
        headers.append((b"retry-after", b"%d" % max(1, -int(-retry_after_s // 1))))
        headers.append((b"retry-after-ms", b"%d" % max(1, -int(-retry_after_s * 1000 // 1))))
    is_worth_it = may_retry or (retry_after_s is not None and retry_after_s <= WORTH_WAITING_S)
    headers.append((b"x-should-retry", b"true" if is_worth_it else b"false"))
    return headers


def denial_answer(denial: Denial, family: Family, request_id: str) -> tuple[int, Headers, bytes]:
    """A limit's no has its figures in the error, under `limit`."""
    headers = error_headers(family, request_id, denial.retry_after_s)
    told = _error(family, denial.status, denial.code, denial.message, request_id, denial.param)
    if denial.refused is not None:
        headers += refused_headers(family, denial.refused)
        told["error"]["limit"] = refused_details(denial.refused)
    return denial.status, headers, orjson.dumps(told)


# What a caller is told; the error's own message may name addresses, and is for the log.
CAUSES: Final[dict[ErrorKind, str]] = {
    "connect": "it cannot be reached",
    "tls": "its certificate or TLS handshake was not accepted",
    "proxy": "the way to it is barred by a proxy",
    "reset": "it closed the connection before it answered",
    "protocol": "what it answered is not valid HTTP/1.1",
    "too_large": "its answer is larger than this gateway accepts",
    "incomplete": "its answer broke off",
    "unusable": "what it answered is not the API's (a redirect, a page, or a coding nobody asked for)",
    "connect_timeout": "it did not accept the connection in time",
    "first_byte_timeout": "it did not begin to answer in time",
    "idle_timeout": "its answer stalled",
    "total_timeout": "it took longer than a request may",
}


def upstream_status(error: UpstreamError) -> int:
    return 504 if error.kind in TIMEOUTS else 502


def upstream_answer(
    error: UpstreamError, target: str, family: Family, request_id: str
) -> tuple[int, Headers, bytes]:
    """502 or 504 with the cause. Our own retries are spent by then, so the client is told not to add to them."""
    status = upstream_status(error)
    message = f"no usable answer from `{target}`: {CAUSES[error.kind]}"
    return (
        status,
        error_headers(family, request_id, None),
        envelope(family, status, f"upstream_{error.kind}", message, request_id),
    )


def foreign_error(status: int, target: str, family: Family, request_id: str) -> bytes:
    """The envelope in place of an upstream's error that is none of the API's: a page, a word, nothing at all."""
    message = f"`{target}` answered with status {status} and without an error in the API's form"
    return envelope(family, status, "upstream_error", message, request_id)


def edge_answer(status: int, code: str, message: str, path: bytes, request_id: str) -> tuple[Headers, bytes]:
    """A refusal from before routing; the path, where there is one, tells the family."""
    family: Family = "anthropic" if path.startswith(b"/v1/messages") else "openai"
    retry_after_s = 1.0 if status == 503 else None
    return (
        error_headers(family, request_id, retry_after_s),
        envelope(family, status, code, message, request_id),
    )
