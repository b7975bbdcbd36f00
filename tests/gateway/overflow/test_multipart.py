"""Forms as clients write them, and as nobody should."""

import pytest

from gateway.http_rules import Refusal
from gateway.overflow.multipart import FormReader, Part

TYPE = b"multipart/form-data; boundary=XyZ"


def field(name: bytes, content: bytes, more: bytes = b"") -> bytes:
    return (
        b'--XyZ\r\nContent-Disposition: form-data; name="'
        + name
        + b'"'
        + more
        + b"\r\n\r\n"
        + content
        + b"\r\n"
    )


FORM = (
    field(b"purpose", b"batch")
    + field(
        b"file", b"line\r\n--Xy\r\nmore\r\n", b'; filename="a b.jsonl"\r\nContent-Type: application/jsonl'
    )
    + field(b"empty", b"")
    + b"--XyZ--\r\n"
)
FOUND = [
    ("purpose", None, b"batch"),
    ("file", "a b.jsonl", b"line\r\n--Xy\r\nmore\r\n"),
    ("empty", None, b""),
]


def read(*pieces: bytes, content_type: bytes = TYPE):
    form = FormReader(content_type)
    parts: list[list] = []
    for piece in pieces:
        for found in form.feed(piece):
            if isinstance(found, Part):
                parts.append([found.name, found.filename, b""])
            else:
                parts[-1][2] += found
    form.end()
    return [tuple(part) for part in parts]


def test_fields_and_files_come_out_as_they_went_in():
    assert read(FORM) == FOUND
    assert read(b"preamble\r\n" + FORM + b"epilogue") == FOUND


def test_every_split_gives_the_same_form():
    for cut in range(1, len(FORM)):
        assert read(FORM[:cut], FORM[cut:]) == FOUND, cut
    assert read(*(FORM[at : at + 1] for at in range(len(FORM)))) == FOUND


@pytest.mark.parametrize(
    "content_type",
    [
        b'multipart/form-data; boundary="XyZ"',
        b"Multipart/Form-Data;boundary=XyZ; charset=utf-8",
        b"multipart/form-data; charset=utf-8; boundary=XyZ",
    ],
)
def test_boundaries_are_read_however_they_are_written(content_type):
    assert read(FORM, content_type=content_type) == FOUND


def test_file_names_may_be_quoted_escaped_or_encoded():
    def name(more):
        return read(field(b"file", b"x", more) + b"--XyZ--")[0][1]

    assert name(b'; filename="a\\"b.jsonl"') == 'a"b.jsonl'
    assert name(b"; filename=plain.jsonl") == "plain.jsonl"
    assert name('; filename="grüße.jsonl"'.encode()) == "grüße.jsonl"
    assert name(b"; filename=\"x\"; filename*=UTF-8''gr%C3%BC%C3%9Fe.jsonl") == "grüße.jsonl"


@pytest.mark.parametrize(
    "content_type", [None, b"", b"application/json", b"multipart/form-data", b"multipart/mixed; boundary=XyZ"]
)
def test_other_content_types_are_refused(content_type):
    with pytest.raises(Refusal) as refused:
        FormReader(content_type)
    assert refused.value.status == 415


@pytest.mark.parametrize(
    "form",
    [
        FORM[:-6],
        b"",
        b"--XyZ\r\nContent-Type: text/plain\r\n\r\nx\r\n--XyZ--",
        b"--XyZ\r\nContent-Disposition: form-data\r\n\r\nx\r\n--XyZ--",
        b"--XyZ more\r\nContent-Disposition: form-data; name=a\r\n\r\nx\r\n--XyZ--",
        b"--XyZ\r\n" + b"x" * 10_000,
        b"--XyZ" + b"x" * 10_000,
        field(b"a", b"x") * 40 + b"--XyZ--",
    ],
    ids=[
        "cut",
        "empty",
        "no disposition",
        "no name",
        "boundary",
        "long headers",
        "long boundary",
        "many parts",
    ],
)
def test_malformed_forms_are_refused(form):
    with pytest.raises(Refusal) as refused:
        read(form)
    assert (refused.value.status, refused.value.code) == (400, "invalid_form")
