"""A head that repeats the one before: read once, and never taken for another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.http_rules import Head, Refusal

FIRST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: 123\r\nAuthorization: Bearer abc\r\n\r\n"
)
FIELDS = ("method", "path", "query", "is_http11", "headers", "length", "expects_continue", "keeps_alive")


def read(data: bytes) -> Head:
    return Head(data, 8192, 100)


def told(head: Head) -> list:
    return [getattr(head, name) for name in FIELDS]


@pytest.mark.parametrize("length", [b"0", b"7", b"123", b"00012", b"999999999999999"])
def test_another_length_is_all_that_a_repeated_head_may_change(length):
    again = FIRST.replace(b"123", length)
    head = read(FIRST)
    first_headers = head.headers
    assert head.is_repeated_by(again)
    assert told(head) == told(read(again))
    assert first_headers[b"content-length"] == b"123", "the first request keeps its own headers"


@pytest.mark.parametrize(
    "other",
    [
        FIRST.replace(b"abc", b"abd"),
        FIRST.replace(b"chat", b"chaT"),
        FIRST.replace(b"123", b""),
        FIRST.replace(b"123", b"1 3"),
        FIRST.replace(b"123", b"+23"),
        FIRST.replace(b"123", b"1" * 16),
        FIRST.replace(b"123", b"1\r\nContent-Length: 2"),
        FIRST.replace(b"123", b"1\r\nTransfer-Encoding: chunked"),
        FIRST.replace(b"\r\n\r\n", b"\r\nX: y\r\n\r\n"),
        FIRST.replace(b"Content-Length: 123\r\n", b""),
        b"",
    ],
)
def test_a_head_with_any_other_difference_is_read(other):
    head = read(FIRST)
    assert not head.is_repeated_by(other)
    assert told(head) == told(read(FIRST))


@pytest.mark.parametrize(
    "first",
    [
        FIRST.replace(b"POST", b"GET"),
        FIRST.replace(b"Host", b"Expect: 100-continue\r\nHost"),
        FIRST.replace(b"Content-Length: 123", b"Transfer-Encoding: chunked"),
        FIRST.replace(b"Host", b"X-Long: " + b"x" * 5000 + b"\r\nHost"),
    ],
)
def test_what_depends_on_the_body_and_what_is_long_is_read_every_time(first):
    assert not read(first).is_repeated_by(first)


@given(st.integers(0, len(FIRST) - 1), st.binary(max_size=6), st.integers(0, 6))
def test_a_repeated_head_says_what_reading_it_says(at, written, removed):
    data = FIRST[:at] + written + FIRST[at + removed :]
    head = read(FIRST)
    if head.is_repeated_by(data):
        assert told(head) == told(read(data))
    else:
        assert told(head) == told(read(FIRST))


def test_a_second_length_is_refused_after_a_head_with_one():
    with pytest.raises(Refusal):
        read(FIRST.replace(b"123", b"1\r\nContent-Length: 2"))
