"""Requests that are not acceptable HTTP, or not acceptable before their body is looked into."""

import gzip
import json
import zlib
from typing import NamedTuple

from tests.support.gateway_process import KEY, OPERATOR_KEY

BODY_LIMIT = 65536  # of the gateway under test
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
GOOD = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}).encode()
MEBIBYTE = bytes(1 << 20)


class Vector(NamedTuple):
    """Bytes that a client sends, and what it must be told. `code` None: Anthropic's envelope has none."""

    data: bytes
    status: int
    code: str | None
    family: str = "openai"


def request(
    *lines: str,
    method: str = "POST",
    path: str = CHAT,
    body: bytes = GOOD,
    version: str = "HTTP/1.1",
    key: str | None = KEY,
    host: str | None = "gateway",
    length: bool = True,
    content_type: str | None = "application/json",
) -> bytes:
    """A good request but for what is given; `lines` are further header lines."""
    head = [f"{method} {path} {version}"]
    if host is not None:
        head.append(f"Host: {host}")
    if key is not None:
        head.append(f"Authorization: Bearer {key}")
    if content_type is not None:
        head.append(f"Content-Type: {content_type}")
    if length:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, *lines, "", ""]).encode("latin-1") + body


def chunked(*chunks: bytes, **changes) -> bytes:
    return request("Transfer-Encoding: chunked", body=b"".join(chunks), length=False, **changes)


def coded(coding: str, body: bytes) -> bytes:
    return request(f"Content-Encoding: {coding}", body=body)


def bad_line(data: bytes) -> Vector:
    return Vector(data, 400, "invalid_request_line")


def bad_header(*lines: str, **changes) -> Vector:
    return Vector(request(*lines, **changes), 400, "invalid_header")


def bad_host(host: str | None) -> Vector:
    return Vector(request(host=host), 400, "invalid_host")


def bad_target(path: str) -> Vector:
    return Vector(request(path=path), 400, "invalid_target")


def bad_length(value: str) -> Vector:
    return Vector(request(f"Content-Length: {value}", length=False), 400, "invalid_header")


def bad_coding(*lines: str, **changes) -> Vector:
    data = request(*lines, body=b"0\r\n\r\n", length=False, **changes)
    return Vector(data, 400, None)


def bad_chunks(*chunks: bytes) -> Vector:
    return Vector(chunked(*chunks), 400, "invalid_chunk")


def no_such(path: str) -> Vector:
    return Vector(request(path=path), 404, "unknown_url")


def not_allowed(method: str, path: str) -> Vector:
    return Vector(request(method=method, path=path), 405, "method_not_allowed")


def bad_key(key: str | None, *lines: str, code: str = "key_unknown") -> Vector:
    return Vector(request(*lines, key=key), 401, code)


def duplicate(*lines: str, **changes) -> Vector:
    return Vector(request(*lines, **changes), 400, "duplicate_header")


VECTORS = {
    # the request line
    "a TLS client hello": bad_line(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(32))),
    "binary rubbish": bad_line(bytes(range(128, 256)) + b"\r\n\r\n"),
    "zero bytes": bad_line(bytes(100)),
    "an SSH greeting": bad_line(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a Redis command": bad_line(b"*1\r\n$4\r\nPING\r\n"),
    "an HTTP/2 preface": Vector(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, None),
    "a method in lower case": bad_line(request(method="post")),
    "a method with a symbol": bad_line(request(method="PO$T")),
    "an endless method": bad_line(b"A" * 200),
    "no method": bad_line(b" / HTTP/1.1\r\nHost: a\r\n\r\n"),
    "two spaces before the path": Vector(b"POST  /v1/models HTTP/1.1\r\nHost: a\r\n\r\n", 400, None),
    "a tab for a space": Vector(b"GET\t/v1/models\tHTTP/1.1\r\nHost: a\r\n\r\n", 400, None),
    "a space in the path": Vector(request(path="/v1/chat /completions"), 400, None),
    "HTTP/0.9": Vector(b"GET /v1/models\r\n", 400, None),
    "HTTP/1.2": Vector(request(version="HTTP/1.2"), 400, "invalid_http_version"),
    "HTTP/2.0": Vector(request(version="HTTP/2.0"), 400, "invalid_http_version"),
    "RTSP": Vector(request(version="RTSP/1.0"), 400, "invalid_http_version"),
    "lower case http": Vector(request(version="http/1.1"), 400, "invalid_http_version"),
    "an absolute target": bad_target("http://example.com/v1/chat/completions"),
    "a target for CONNECT": Vector(request(method="CONNECT", path="example.com:443"), 400, "invalid_target"),
    "OPTIONS *": Vector(request(method="OPTIONS", path="*"), 400, "invalid_target"),
    "a fragment": bad_target(f"{CHAT}#top"),
    "a path beyond ASCII": bad_target("/v1/modèles"),
    "a control character in the path": bad_target("/v1/\x01models"),
    "a quote-less relative path": bad_target("v1/chat/completions"),
    "a path of nine thousand characters": Vector(request(path="/" + "a" * 9000), 414, "target_too_long"),
    "a query of nine thousand characters": Vector(
        request(path=CHAT + "?" + "a" * 9000), 414, "target_too_long"
    ),
    # headers
    "no host": bad_host(None),
    "an empty host": bad_host(""),
    "a host with a path": bad_host("a/b"),
    "a host with a user": bad_host("user@a"),
    "a host with a space": bad_host("a b"),
    "a host of three hundred characters": bad_host("a" * 300),
    "a port that is none": bad_host("a:port"),
    "two hosts": duplicate("Host: other"),
    "a line without a colon": bad_header("just words"),
    "a space before the colon": bad_header("X-One : 1"),
    "a header without a name": bad_header(": 1"),
    "a name with a space": bad_header("X One: 1"),
    "a folded line": bad_header("X-One: 1\r\n 2"),
    "a NUL in a value": bad_header("X-One: a\x00b"),
    "a bare CR in a value": bad_header("X-One: a\rb"),
    "lines that end with LF alone": bad_header(host="a\nX-One: 1"),
    "a hundred and fifty headers": Vector(
        request(*(f"X-{n}: 1" for n in range(150))), 431, "too_many_headers"
    ),
    "one header a hundred and fifty times": Vector(request(*["X-One: 1"] * 150), 431, "too_many_headers"),
    "a header of forty kilobytes": Vector(request("X-One: " + "a" * 40_000), 431, "headers_too_large"),
    "an upgrade to websocket": Vector(
        request("Connection: Upgrade", "Upgrade: websocket"), 400, "upgrade_refused"
    ),
    "an upgrade to HTTP/2": Vector(
        request("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"),
        400,
        "upgrade_refused",
    ),
    "an expectation nobody knows": Vector(request("Expect: 200-ok"), 417, "expectation_failed"),
    # framing
    "two lengths that differ": bad_header("Content-Length: 7"),
    "two lengths that agree": bad_header(f"Content-Length: {len(GOOD)}"),
    "a list of lengths": bad_length("5, 5"),
    "a negative length": bad_length("-1"),
    "a length with a sign": bad_length("+5"),
    "a hexadecimal length": bad_length("0x10"),
    "a length with a fraction": bad_length("5.0"),
    "an empty length": bad_length(""),
    "a length beyond 64 bits": bad_length("99999999999999999999"),
    "a length above the limit": Vector(
        request(f"Content-Length: {BODY_LIMIT + 1}", length=False), 413, "body_too_large"
    ),
    "a length and chunks": bad_coding("Content-Length: 5", "Transfer-Encoding: chunked"),
    "chunks in HTTP/1.0": bad_coding("Transfer-Encoding: chunked", version="HTTP/1.0"),
    "transfer-encoding gzip": bad_coding("Transfer-Encoding: gzip"),
    "transfer-encoding chunked, gzip": bad_coding("Transfer-Encoding: chunked, gzip"),
    "transfer-encoding gzip, chunked": bad_coding("Transfer-Encoding: gzip, chunked"),
    "transfer-encoding xchunked": bad_coding("Transfer-Encoding: xchunked"),
    "transfer-encoding identity": bad_coding("Transfer-Encoding: identity"),
    "chunked in quotes": bad_coding('Transfer-Encoding: "chunked"'),
    "a vertical tab before chunked": Vector(
        request("Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n", length=False), 400, None
    ),
    "transfer-encoding twice": bad_coding("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    "a chunk size that is no number": bad_chunks(b"zz\r\nab\r\n0\r\n\r\n"),
    "a negative chunk size": bad_chunks(b"-2\r\nab\r\n0\r\n\r\n"),
    "a chunk size beyond 64 bits": bad_chunks(b"fffffffffffffffff\r\nab\r\n0\r\n\r\n"),
    "an empty chunk size": bad_chunks(b"\r\nab\r\n0\r\n\r\n"),
    "a chunk longer than its size": bad_chunks(b"2\r\nabcdef\r\n0\r\n\r\n"),
    "a chunk size ended by LF alone": bad_chunks(b"2\nab\r\n0\r\n\r\n"),
    "a malformed trailer": bad_chunks(b"2\r\n{}\r\n0\r\nno colon\r\n\r\n"),
    "chunks above the limit": Vector(
        chunked(*[b"4000\r\n" + bytes(0x4000) + b"\r\n"] * 5, b"0\r\n\r\n"), 413, "body_too_large"
    ),
    "an endless chunk extension": Vector(chunked(b"2;" + b"a" * 400_000), 431, "trailers_too_large"),
    "endless trailers": Vector(
        chunked(b"2\r\n{}\r\n0\r\n", *[b"X-One: 1\r\n"] * 40_000, b"\r\n"), 431, "trailers_too_large"
    ),
    # too slow
    "half a request line": Vector(b"POST /v1/chat", 408, "request_timeout"),
    "half a head": Vector(request()[:60], 408, "request_timeout"),
    "half a head of a message": Vector(request(path=MESSAGES)[:60], 408, None, "anthropic"),
    "half a body": Vector(request()[:-10], 408, "request_timeout"),
    "half a chunk": Vector(chunked(b"40\r\n{"), 408, "request_timeout"),
    # routes
    "an unknown path": no_such("/v1/chat"),
    "no path at all": no_such("/"),
    "a slash at the end": no_such(f"{CHAT}/"),
    "two slashes at the start": no_such(f"/{CHAT}"),
    "an escaped letter in the path": no_such("/v1/%63hat/completions"),
    "dots in the path": no_such("/v1/../v1/chat/completions"),
    "escaped dots in the path": no_such("/v1/%2e%2e/v1/chat/completions"),
    "the path in upper case": no_such("/V1/CHAT/COMPLETIONS"),
    "an escaped NUL in the path": no_such(f"{CHAT}%00"),
    "the management plane's path": no_such("/metrics"),
    "an unknown path below messages": Vector(request(path="/v1/messages/x"), 404, None, "anthropic"),
    "GET of a completion": not_allowed("GET", CHAT),
    "DELETE of a completion": not_allowed("DELETE", CHAT),
    "a method nobody knows": bad_header(method="BREW"),
    "TRACE": not_allowed("TRACE", CHAT),
    "POST to the models": not_allowed("POST", "/v1/models"),
    "GET of a message": Vector(request(method="GET", path=MESSAGES), 405, None, "anthropic"),
    # who asks
    "no key": bad_key(None, code="key_missing"),
    "an empty key": bad_key("", code="key_missing"),
    "a wrong key": bad_key("sk-nobody"),
    "a key with bytes beyond ASCII": bad_key("sk-\xff\xfe\xe4"),
    "a key of twenty kilobytes": bad_key("k" * 20_000),
    "an operator's key": bad_key("op-hg-0123456789abcdef0123456789abcdef", code="key_operator"),
    "an operator's key of a form of its own": bad_key(OPERATOR_KEY),
    "basic authentication": bad_key(None, "Authorization: Basic dGVzdDp0ZXN0", code="key_missing"),
    "a wrong key in the other header": bad_key(None, "x-api-key: sk-nobody"),
    "a key in the query": Vector(request(path=f"{CHAT}?api_key={KEY}", key=None), 401, "key_missing"),
    "two keys": duplicate(f"Authorization: Bearer {KEY}"),
    "no key for a message": Vector(request(path=MESSAGES, key=None), 401, None, "anthropic"),
    # what the body is said to be
    "plain text": Vector(request(content_type="text/plain"), 415, "unsupported_media_type"),
    "a form": Vector(
        request(content_type="application/x-www-form-urlencoded"), 415, "unsupported_media_type"
    ),
    "an empty content type": Vector(request(content_type=""), 415, "unsupported_media_type"),
    "JSON in UTF-16": Vector(
        request(content_type="application/json; charset=utf-16"), 415, "unsupported_charset"
    ),
    "two content types": duplicate("Content-Type: text/plain"),
    "a coding nobody knows": Vector(coded("br", GOOD), 415, "unsupported_encoding"),
    "two codings": Vector(
        coded("gzip, gzip", gzip.compress(gzip.compress(GOOD))), 415, "unsupported_encoding"
    ),
    "gzip that is none": Vector(coded("gzip", GOOD), 400, "invalid_encoding"),
    "deflate that is none": Vector(coded("deflate", b"\xff" * 50), 400, "invalid_encoding"),
    "zstd that is none": Vector(coded("zstd", GOOD), 400, "invalid_encoding"),
    "gzip cut off": Vector(coded("gzip", gzip.compress(GOOD)[:-9]), 400, "invalid_encoding"),
    "gzip with a wrong checksum": Vector(
        coded("gzip", gzip.compress(GOOD)[:-8] + bytes(8)), 400, "invalid_encoding"
    ),
    "gzip and more after it": Vector(coded("gzip", gzip.compress(GOOD) + b"more"), 400, "invalid_encoding"),
    "a gzip bomb": Vector(coded("gzip", gzip.compress(MEBIBYTE * 20)), 413, "body_too_large"),
    "a deflate bomb": Vector(coded("deflate", zlib.compress(MEBIBYTE * 20)), 413, "body_too_large"),
    "a model in the query": Vector(request(path=f"{CHAT}?model=other"), 400, "model_in_query"),
    "an escaped model in the query": Vector(request(path=f"{CHAT}?a=1&%6dodel=other"), 400, "model_in_query"),
    "twenty tags": Vector(request("x-headgate-tags: " + ",".join(map(str, range(20)))), 400, "invalid_tags"),
    "a tag beyond ASCII": Vector(request("x-headgate-tags: caf\xe9"), 400, "invalid_tags"),
}
