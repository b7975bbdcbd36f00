"""What a batch's file may be: each line's faults by OpenAI's codes, and memory that does not grow with the file."""

import json
import tracemalloc

import pytest

from gateway.overflow.batch_input import MOST_ERRORS, BatchInput, ChangedFileError, split_lines

ENDPOINT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def line(custom_id="a", **changes) -> bytes:
    found = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": BODY} | changes
    return json.dumps({name: value for name, value in found.items() if value is not ...}).encode() + b"\n"


def checked(*frames: bytes, most_lines: int = 100, line_bytes: int = 10_000) -> BatchInput:
    rules = BatchInput(ENDPOINT, most_lines=most_lines, line_bytes=line_bytes)
    rules.check(frames)
    return rules


def test_a_good_file_becomes_its_requests():
    data = line("a") + b"\n  \r\n" + line("b")[:-1]
    rules = checked(data)
    assert (rules.errors, rules.lines, rules.model) == ([], 2, "m")
    found = list(rules.requests([data], 0))
    assert [(each.number, each.custom_id, json.loads(each.body)) for each in found] == [
        (1, "a", BODY),
        (4, "b", BODY),
    ]
    assert [each.custom_id for each in rules.requests([data], 1)] == ["b"]


def test_bodies_are_the_bytes_that_were_written():
    body = b'{"model": "m",  "seed":12345678901234567890, "x":1.0}'
    data = b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":%b}' % body
    rules = checked(data)
    assert rules.errors == []
    assert next(rules.requests([data], 0)).body == body


def test_every_split_into_frames_gives_the_same_lines():
    data = b"one\n\ntwo\r\nthree"
    expected = [(1, b"one"), (3, b"two\r"), (4, b"three")]
    for first in range(len(data)):
        for second in range(first, len(data)):
            frames = [data[:first], data[first:second], data[second:]]
            assert list(split_lines(frames, 100)) == expected


def test_a_line_that_is_too_long_is_not_held():
    frames = [b"a" * 600, b"a" * 600 + b"\nshort\n" + b"b" * 600, b"b" * 600]
    assert list(split_lines(frames, 1000)) == [(1, None), (2, b"short"), (3, None)]


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{]\n", "invalid_json_line", None),
        (b"[1]\n", "invalid_json_line", None),
        (b'"text"\n', "invalid_json_line", None),
        (b'{"custom_id": "\xff"}\n', "invalid_json_line", None),
        (b"[" * 5000 + b"\n", "invalid_json_line", None),
        (line(...), "missing_required_parameter", "custom_id"),
        (line(""), "missing_required_parameter", "custom_id"),
        (line(7), "missing_required_parameter", "custom_id"),
        (line("x" * 513), "invalid_request", "custom_id"),
        (line("first"), "duplicate_custom_id", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(url="/v1/embeddings"), "url_mismatch", "url"),
        (line(url=...), "url_mismatch", "url"),
        (line(body=...), "missing_required_parameter", "body"),
        (line(body=[]), "missing_required_parameter", "body"),
        (line(body={}), "invalid_request", "body.model"),
        (line(body={"model": 1}), "invalid_request", "body.model"),
        (line(body=BODY | {"stream": True}), "invalid_request", "body.stream"),
        (line(body=BODY | {"model": "other"}), "model_mismatch", "body.model"),
        (line(body=BODY | {"n": "x"}), "invalid_request", "body.n"),
        (line(body=BODY | {"x": "y" * 10_000}), "line_too_long", None),
    ],
    ids=str,
)
def test_a_bad_line_is_told_with_its_number(bad, code, param):
    rules = checked(line("first") + bad + line("last"))
    assert [(error.code, error.param, error.line) for error in rules.errors] == [(code, param, 2)]
    assert rules.errors[0].message


def test_files_without_requests_or_with_too_many_are_told_as_a_whole():
    for data in (b"", b"\n\n \n"):
        assert [(error.code, error.line) for error in checked(data).errors] == [("empty_file", None)]
    many = checked(*(line(f"{number}") for number in range(9)), most_lines=8)
    assert [error.code for error in many.errors] == ["too_many_tasks"]


def test_only_the_first_errors_are_told():
    assert len(checked(b"{\n" * 1000, most_lines=2000).errors) == MOST_ERRORS


def test_a_file_that_changed_after_its_check_is_noticed():
    rules = checked(line())
    with pytest.raises(ChangedFileError):
        list(rules.requests([b"{\n"], 0))


def test_memory_does_not_grow_with_the_file():
    filler = {"model": "m", "messages": [{"role": "user", "content": "x" * 2000}]}

    def frames():
        for start in range(0, 4000, 100):
            yield b"".join(line(f"request-{start + n}", body=filler) for n in range(100))

    tracemalloc.start()
    rules = BatchInput(ENDPOINT, most_lines=50_000, line_bytes=10_000)
    rules.check(frames())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (rules.errors, rules.lines) == ([], 4000)
    assert peak < 3_000_000, f"8 MB of lines took {peak} bytes"
