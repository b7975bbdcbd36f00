"""Answers of an upstream that are broken, absurd or hostile, and what a client must make of each.

`Failed`: no usable answer, an envelope with the cause. `Broken`: the stream began well, then an error in band and a
body without its end. `Passed`: odd but whole; relayed as it is, and billed only if that can be done honestly.
"""

import gzip
import json
from dataclasses import dataclass
from typing import Any

from tests.support import recordings
from tests.support.recordings import Tokens
from tests.support.scripted_answer import Answer, Cut, Hang, Pause, Reset

OK = b"HTTP/1.1 200 OK\r\n"
BODY = json.dumps(recordings.chat()).encode()
WHOLE = Answer.of_json(BODY)
EVENTS = recordings.chat_events("one two three four five six seven eight")
STREAM = Answer.of_events(EVENTS)
TOKENS = Tokens()
COST = TOKENS.prompt * 1000 + TOKENS.output * 2000
PAGE = b"<html><head><title>502 Bad Gateway</title></head><body><h1>nginx</h1></body></html>"


@dataclass(frozen=True)
class Failed:
    """`code` is what follows `upstream_` in the envelope."""

    answer: Answer
    status: int
    code: str
    is_stream: bool = False


@dataclass(frozen=True)
class Broken:
    """`kind` is what the row says: nothing, if nothing but the last event was missing."""

    answer: Answer
    kind: str = ""


@dataclass(frozen=True)
class Passed:
    """`cost` in nano-dollars; None: unknown."""

    answer: Answer
    cost: int | None = COST
    is_stream: bool = False


def head(*lines: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\n%b\r\n" % (status, b"".join(line + b"\r\n" for line in lines))


def raw(*parts: Any) -> Answer:
    return Answer.of_bytes(*parts)


def no_http(data: bytes) -> Failed:
    """Not an answer in HTTP/1.1; the connection then waits, as one of another protocol would."""
    return Failed(raw(data, Hang()), 502, "protocol")


def bad_head(*lines: bytes, status: bytes = b"200 OK") -> Failed:
    return Failed(raw(head(*lines, status=status), BODY, Hang()), 502, "protocol")


def bad_chunks(*chunks: bytes) -> Failed:
    data = head(b"content-type: application/json", b"transfer-encoding: chunked") + b"".join(chunks)
    return Failed(raw(data, Hang()), 502, "protocol")


def with_usage(usage: Any, cost: int | None) -> Passed:
    return Passed(Answer.of_json({**recordings.chat(tokens=None), "usage": usage}), cost)


def unusable(body: bytes, content_type: str = "application/json", **headers: str) -> Failed:
    """A 200 that is no answer to anything that was asked."""
    answer = Answer((body,), 200, (("content-type", content_type),)).with_headers(**headers)
    return Failed(answer, 502, "unusable")


def as_stream(answer: Answer) -> Answer:
    return answer.with_headers(content_type="text/event-stream")


NO_ANSWER = {
    "a reset at once": Failed(WHOLE.reset_before_head(), 502, "reset"),
    "a close at once": Failed(WHOLE.cut_before_head(), 502, "reset"),
    "silence": Failed(WHOLE.hang_before_head(), 504, "first_byte_timeout"),
    "binary rubbish": no_http(bytes(range(128, 256))),
    "zero bytes": no_http(bytes(64)),
    "an SSH greeting": no_http(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a TLS alert": no_http(b"\x15\x03\x03\x00\x02\x02\x28"),
    "an HTTP/2 frame": no_http(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + bytes(18)),
    "an SMTP greeting": no_http(b"220 mail.example ESMTP\r\n"),
    "a body without a head": no_http(BODY),
    "HTTP/2.0": bad_head(status=b"200 OK").__class__(
        raw(b"HTTP/2.0 200 OK\r\n\r\n", Hang()), 502, "protocol"
    ),
    "ICY": no_http(b"ICY 200 OK\r\n\r\n"),
    "a status that is no number": bad_head(status=b"abc OK"),
    "a status of two digits": bad_head(status=b"20 OK"),
    "a status of four digits": bad_head(status=b"2000 OK"),
    "a header without a colon": bad_head(b"just words"),
    "a header without a name": bad_head(b": 1"),
    "a name with a space": bad_head(b"x one: 1"),
    "a NUL in a header": bad_head(b"x-one: a\0b"),
    "a bare CR in a header": bad_head(b"x-one: a\rb"),
    "two lengths": bad_head(b"content-length: 10", b"content-length: 20"),
    "a negative length": bad_head(b"content-length: -1"),
    "a length that is no number": bad_head(b"content-length: many"),
    "a length beyond 64 bits": bad_head(b"content-length: 99999999999999999999"),
    "a length and chunks": bad_head(b"content-length: 10", b"transfer-encoding: chunked"),
    "transfer-encoding gzip": bad_head(b"transfer-encoding: gzip"),
    "transfer-encoding gzip, chunked": bad_head(b"transfer-encoding: gzip, chunked"),
    "a header of two hundred kilobytes": Failed(WHOLE.with_headers(x_one="a" * 200_000), 502, "too_large"),
    "a thousand headers": Failed(
        WHOLE.with_headers(**{f"x_{n}": "1" for n in range(1000)}), 502, "too_large"
    ),
    "an endless head": Failed(raw(OK, *[b"x-one: 1\r\n" * 1000] * 20), 502, "too_large"),
    "half a head, then nothing": Failed(raw(OK + b"content-ty", Hang()), 504, "first_byte_timeout"),
    "half a head, then a close": Failed(raw(OK + b"content-ty", Cut()), 502, "reset"),
    "half a head, then a reset": Failed(raw(OK + b"content-ty", Pause(0.05), Reset()), 502, "reset"),
    "a flood of 100 Continue": Failed(raw(*[b"HTTP/1.1 100 Continue\r\n\r\n"] * 50, Hang()), 502, "protocol"),
    "a flood of 103 Early Hints": Failed(
        raw(*[b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"] * 50, Hang()), 502, "protocol"
    ),
    "102 Processing, then nothing": Failed(
        raw(b"HTTP/1.1 102 Processing\r\n\r\n", Hang()), 504, "first_byte_timeout"
    ),
    "101 Switching Protocols": Failed(
        raw(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n", Hang()),
        502,
        "protocol",
    ),
    "a status below 100": bad_head(status=b"099 Odd"),
    # the body of a plain answer
    "a close inside the body": Failed(WHOLE.claiming(5000).cut_after(1), 502, "incomplete"),
    "a reset inside the body": Failed(
        WHOLE.claiming(5000).insert(1, Pause(0.05), Reset()), 502, "incomplete"
    ),
    "silence inside the body": Failed(WHOLE.claiming(5000).hang_after(1), 504, "idle_timeout"),
    "a head and no body": Failed(WHOLE.hang_after(0).claiming(10), 504, "idle_timeout"),
    "a byte now and then": Failed(Answer.of_json(BODY).split(1).trickle(0.2), 504, "total_timeout"),
    "a chunk size that is no number": bad_chunks(b"zz\r\n{}\r\n0\r\n\r\n"),
    "a negative chunk size": bad_chunks(b"-2\r\n{}\r\n0\r\n\r\n"),
    "a chunk size beyond 64 bits": bad_chunks(b"fffffffffffffffff\r\n{}\r\n"),
    "a chunk longer than its size": bad_chunks(b"2\r\n{}{}{}\r\n0\r\n\r\n"),
    "no last chunk": Failed(WHOLE.framed("chunked").cut_after(1), 502, "incomplete"),
    "half a chunk": Failed(
        raw(head(b"content-type: application/json", b"transfer-encoding: chunked") + b"40\r\n{", Cut()),
        502,
        "incomplete",
    ),
    "endless trailers": Failed(
        raw(
            head(b"content-type: application/json", b"transfer-encoding: chunked") + b"2\r\n{}\r\n0\r\n",
            *[b"x-one: 1\r\n" * 1000] * 20,
        ),
        502,
        "too_large",
    ),
    "an endless chunk extension": Failed(
        raw(
            head(b"content-type: application/json", b"transfer-encoding: chunked") + b"2;",
            *[b"a" * 10_000] * 20,
        ),
        502,
        "too_large",
    ),
    "a body beyond the limit": Failed(
        Answer.of_json(b'"%b"' % (b"a" * (3 << 20))).split(1 << 18), 502, "too_large"
    ),
    "a close-delimited body beyond the limit": Failed(
        Answer.of_json(b'"%b"' % (b"a" * (3 << 20))).split(1 << 18).framed("close"), 502, "too_large"
    ),
    # whole, but no answer to what was asked
    "204 No Content": Failed(Answer((), 204, framing="length"), 502, "unusable"),
    "304 Not Modified": Failed(raw(head(status=b"304 Not Modified")), 502, "unusable"),
    "301": Failed(Answer((PAGE,), 301).with_headers(location="http://127.0.0.1:9/v1"), 502, "unusable"),
    "302": Failed(Answer((), 302).with_headers(location="http://169.254.169.254/latest"), 502, "unusable"),
    "307": Failed(Answer((), 307).with_headers(location="/v1/elsewhere"), 502, "unusable"),
    "308": Failed(Answer((), 308).with_headers(location="https://example.com/"), 502, "unusable"),
    "an empty body": unusable(b""),
    "a page": unusable(PAGE, "text/html"),
    "a page that is said to be JSON": unusable(PAGE),
    "half a JSON document": unusable(BODY[:-40]),
    "JSON null": unusable(b"null"),
    "a JSON list": unusable(b"[]"),
    "a JSON string": unusable(b'"hello"'),
    "words": unusable(b"all is well", "text/plain"),
    "invalid UTF-8": unusable(b'{"model": "\xff\xfe"'),
    "a thousand thousand brackets": unusable(b'{"x":' * 100_000),
    "gzip that is none": unusable(BODY, content_encoding="gzip"),
    "gzip cut off": unusable(gzip.compress(BODY)[:-9], content_encoding="gzip"),
    "a gzip bomb": Failed(
        Answer.of_json(gzip.compress(bytes(20 << 20)), content_encoding="gzip"), 502, "too_large"
    ),
    "a coding nobody knows": unusable(BODY, content_encoding="x-rot13"),
    "events under another name": Failed(
        Answer(tuple(EVENTS), 200, (("content-type", "text/plain"),), "chunked"),
        502,
        "unusable",
        is_stream=True,
    ),
    "a compressed stream": Failed(
        Answer(
            (gzip.compress(b"".join(EVENTS)),), 200, (("content-type", "text/event-stream"),), "chunked"
        ).with_headers(content_encoding="gzip"),
        502,
        "unusable",
        is_stream=True,
    ),
    "silence before a stream": Failed(STREAM.hang_before_head(), 504, "first_byte_timeout", is_stream=True),
    "silence after a stream's head": Failed(STREAM.hang_after(0), 504, "first_byte_timeout", is_stream=True),
    "a redirect of a stream": Failed(
        Answer((), 302).with_headers(location="http://127.0.0.1:9/"), 502, "unusable", is_stream=True
    ),
}
# Error statuses keep theirs; what is no error of the API becomes one.
PAGES = {
    f"{status} with {name}": (status, Answer((body,), status, (("content-type", kind),)))
    for status in (400, 403, 404, 429, 500, 502, 503)
    for name, body, kind in (
        ("a page", PAGE, "text/html"),
        ("a word", b"Internal Server Error", "text/plain; charset=utf-8"),
        ("nothing", b"", "application/json"),
    )
}
BROKEN = {
    "a stream without its last event": Broken(STREAM.ending_after(5)),
    "a stream that is empty": Broken(STREAM.ending_after(0)),
    "a close-delimited stream without its last event": Broken(STREAM.ending_after(5).framed("close")),
    "a close inside a stream": Broken(STREAM.cut_after(5), "incomplete"),
    "a reset inside a stream": Broken(STREAM.insert(5, Pause(0.05), Reset()), "incomplete"),
    "silence inside a stream": Broken(STREAM.hang_after(5), "idle_timeout"),
    "a stream without end": Broken(Answer.of_events(EVENTS[:3] * 10).trickle(0.2), "total_timeout"),
    "a bad chunk size inside a stream": Broken(
        raw(
            head(b"content-type: text/event-stream", b"transfer-encoding: chunked")
            + b"%x\r\n%b\r\n" % (len(EVENTS[0]), EVENTS[0]),
            b"zz\r\n",
            Hang(),
        ),
        "protocol",
    ),
    "a page instead of events": Broken(as_stream(Answer((PAGE,)))),
    "a JSON document instead of events": Broken(as_stream(Answer((BODY,)))),
    "an endless comment": Broken(as_stream(Answer((b":" + b" " * 100_000,) * 5))),
}
PASSED = {
    "sixteen interim answers": Passed(
        raw(
            b"HTTP/1.1 103 Early Hints\r\n\r\n" * 16,
            head(b"content-type: application/json", b"content-length: %d" % len(BODY)),
            BODY,
        )
    ),
    "a second answer nobody asked for": Passed(
        raw(
            head(b"content-type: application/json", b"content-length: %d" % len(BODY))
            + BODY
            + OK
            + b"content-length: 2\r\n\r\nno"
        )
    ),
    "more body than it said": Passed(
        raw(head(b"content-type: application/json", b"content-length: %d" % len(BODY)) + BODY + b"more")
    ),
    "gzip that nobody asked for": Passed(Answer.of_json(gzip.compress(BODY), content_encoding="gzip")),
    "no content type": Passed(Answer((BODY,))),
    "JSON for a stream": Passed(WHOLE, is_stream=True),
    "no usage": Passed(Answer.of_json(recordings.chat(tokens=None)), None),
    "usage null": with_usage(None, None),
    "usage a list": with_usage([1, 2], None),
    "usage a string": with_usage("12 tokens", None),
    "usage empty": with_usage({}, None),
    "usage zero": with_usage({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, 0),
    "usage in strings": with_usage({"prompt_tokens": "25", "completion_tokens": "8"}, COST),
    "usage negative": with_usage({"prompt_tokens": -25, "completion_tokens": -8}, None),
    "usage beyond 64 bits": with_usage({"prompt_tokens": 10**30, "completion_tokens": 8}, None),
    "usage at the edge of 64 bits": with_usage(
        {"prompt_tokens": 2**63 - 1, "completion_tokens": 2**63 - 1}, None
    ),
    "usage with fractions": with_usage({"prompt_tokens": 25.5, "completion_tokens": 8}, None),
    "usage a flag": with_usage({"prompt_tokens": True, "completion_tokens": False}, None),
    "more cached than there is": with_usage(
        {"prompt_tokens": 25, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 1000}},
        25 * 100 + 8 * 2000,
    ),
    "a negative number of cached tokens": with_usage(
        {"prompt_tokens": 25, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": -5}}, COST
    ),
    "a model that is a number": Passed(Answer.of_json({**recordings.chat(), "model": 7})),
    "a tier that is a list": Passed(Answer.of_json({**recordings.chat(), "service_tier": ["a"]})),
    "a line of three megabytes": Passed(
        Answer.of_events([*EVENTS[:3], recordings.chat_chunk({"content": "x" * 3_000_000}), *EVENTS[3:]]),
        is_stream=True,
    ),
    "bytes that are no UTF-8 in a stream": Passed(
        STREAM.insert(3, b'data: {"choices":[{"delta":{"content":"\xff\xfe"}}]}\n\n'), is_stream=True
    ),
    "an event that is no JSON": Passed(STREAM.insert(3, b"data: {not json\n\n"), is_stream=True),
    "events after the last one": Passed(Answer.of_events([*EVENTS, EVENTS[2]]), is_stream=True),
    "a thousand empty lines": Passed(STREAM.insert(3, b"\n" * 1000), is_stream=True),
    "zero bytes in a stream": Passed(STREAM.insert(3, b": " + bytes(1000) + b"\n\n"), is_stream=True),
}
