"""Framing without sockets: what every sequence of bytes means, however it is cut."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.http1 import MAX_HEADERS, MAX_INTERIM_ANSWERS, AnswerReader
from tests.support.raw_upstream import LAST_CHUNK, chunk, chunked_head, sized


class Outcome:
    """What a reader makes of reads and an end of input."""

    def __init__(self, *reads, is_clean=True, is_head_request=False, max_head_bytes=65536, ends=True):
        reader = AnswerReader(max_head_bytes)
        reader.expect(is_head_request=is_head_request)
        self.pieces = []
        for data in reads:
            reader.feed(data)
            self.pieces.append(b"".join(reader.pieces))
            reader.pieces.clear()
            if reader.error is not None:
                break
        error = reader.error
        if error is None and not reader.is_complete and ends:
            error = reader.end_of_input(is_clean=is_clean)
        self.kind = error.kind if error is not None else None
        self.message = error.message if error is not None else ""
        self.body = b"".join(self.pieces)
        self.status, self.headers = reader.status, reader.headers
        self.is_complete, self.is_reusable = reader.is_complete, reader.is_reusable
        self.idle_limit_s = reader.idle_limit_s

    def what(self):
        return self.kind, self.status, self.headers, self.body, self.is_complete, self.is_reusable


CHUNKED = chunked_head(b"Content-Type: text/event-stream") + chunk(b"data: 1\n\n") + chunk(b"data: 2\n\n")
RECORDED = {
    "length": sized(b'{"id":1}', b"Content-Type: application/json", b"Keep-Alive: timeout=5"),
    "empty": sized(b""),
    "chunked": CHUNKED + LAST_CHUNK,
    "chunk extensions": chunked_head() + b"3;a=b\r\nabc\r\n" + LAST_CHUNK,
    "trailers": CHUNKED + b"0\r\nx-checksum: 1\r\nx-other: 77\r\n\r\n",
    "close-delimited": b"HTTP/1.1 200 OK\r\n\r\nall until the end",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\ncontent-length: 10\r\n\r\n",
    "old": b"HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\nabc",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + sized(b"abc"),
    "no reason": b"HTTP/1.1 200\r\ncontent-length: 1\r\n\r\na",
}


@pytest.mark.parametrize("name", RECORDED)
def test_every_cut_in_two_gives_the_same_answer(name):
    data = RECORDED[name]
    whole = Outcome(data)
    assert whole.kind is None
    assert whole.is_complete
    for at in range(1, len(data)):
        assert Outcome(data[:at], data[at:]).what() == whole.what(), at
    assert Outcome(*(data[i : i + 1] for i in range(len(data)))).what() == whole.what()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(RECORDED)), st.lists(st.integers(1, 400), max_size=8))
def test_every_split_gives_the_same_answer(name, cuts):
    data = RECORDED[name]
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    reads = [data[a:b] for a, b in itertools.pairwise(edges)]
    assert Outcome(*reads).what() == Outcome(data).what()


@pytest.mark.parametrize("name", RECORDED)
def test_an_answer_cut_short_is_never_complete(name):
    data = RECORDED[name]
    if name == "close-delimited":
        assert Outcome(data, is_clean=False).kind == "incomplete"
        return
    for length in range(len(data)):
        cut = Outcome(data[:length])
        assert cut.kind in {"reset", "incomplete"}, length
        assert not cut.is_complete


def test_names_are_lower_case_repetitions_become_one_list_and_outer_blanks_go():
    answer = sized(b"", b"Set-Cookie: a", b"X-B:  two words \t", b"set-cookie: b", b"X-Empty:")
    assert Outcome(answer).headers == {
        b"content-length": b"0",
        b"set-cookie": b"a, b",
        b"x-b": b"two words",
        b"x-empty": b"",
    }


def test_trailers_are_dropped():
    assert Outcome(RECORDED["trailers"]).headers == Outcome(RECORDED["chunked"]).headers


def test_a_reader_reads_one_answer_after_the_other():
    reader = AnswerReader(65536)
    for body in (b"first", b"second"):
        reader.expect(is_head_request=False)
        assert reader.is_untouched
        reader.feed(sized(body))
        assert not reader.is_untouched
        assert reader.is_complete
        assert reader.is_reusable
        assert reader.pieces == [body]
        reader.pieces.clear()


@pytest.mark.parametrize(
    ("answer", "reusable"),
    [
        (sized(b"a"), True),
        (RECORDED["chunked"], True),
        (RECORDED["trailers"], True),
        (RECORDED["no content"], True),
        (sized(b"a", b"Connection: close"), False),
        (sized(b"a", b"connection: keep-alive, Close"), False),
        (sized(b"a", b"connection: close", b"connection: keep-alive"), False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\na", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 1\r\nconnection: keep-alive\r\n\r\na", True),
        (RECORDED["close-delimited"], False),
        (sized(b"a") + b"x", False),
        (sized(b"a") + sized(b"b"), False),
        (sized(b"a") + b"HTTP/1.1 408 Request Timeout\r\n\r\n", False),
        (RECORDED["no content"] + b"abc", False),
        (RECORDED["chunked"] + b"0\r\n\r\n", False),
        (chunked_head() + b"0\r\n\r\nHTTP", False),
    ],
)
def test_a_connection_is_reused_only_after_a_clean_end(answer, reusable):
    outcome = Outcome(answer)
    assert outcome.kind is None
    assert outcome.is_complete
    assert outcome.is_reusable is reusable


@pytest.mark.parametrize(
    ("value", "limit_s"),
    [(b"timeout=5", 4), (b"max=100, Timeout = 30", 29), (b"timeout=1", 0), (b"max=3", None)],
)
def test_the_upstreams_idle_limit_is_kept_with_a_second_to_spare(value, limit_s):
    outcome = Outcome(sized(b"", b"keep-alive: " + value))
    assert outcome.idle_limit_s == limit_s


def test_an_answer_to_head_has_no_body_whatever_it_says():
    outcome = Outcome(sized(b"")[:-4] + b"\r\ncontent-type: x\r\n\r\n", is_head_request=True)
    assert outcome.is_complete
    outcome = Outcome(b"HTTP/1.1 200 OK\r\ncontent-length: 512\r\n\r\n", is_head_request=True)
    assert (outcome.kind, outcome.is_complete, outcome.body) == (None, True, b"")


HOSTILE = {
    "not http": (b"SSH-2.0-OpenSSH_9.2\r\n", "protocol"),
    "tls alert": (b"\x15\x03\x01\x00\x02\x02\x46", "protocol"),
    "http2 preface answer": (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", "protocol"),
    "http/2 version": (b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n", "protocol"),
    "http/0.9 version": (b"HTTP/0.9 200 OK\r\n\r\n", "protocol"),
    "switching protocols": (b"HTTP/1.1 101 X\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\nfoo", "protocol"),
    "unknown interim": (b"HTTP/1.1 199 X\r\n\r\n" + sized(b""), "protocol"),
    "status below 100": (b"HTTP/1.1 099 X\r\n\r\n", "protocol"),
    "long status": (b"HTTP/1.1 20000 X\r\n\r\n", "protocol"),
    "endless interims": (b"HTTP/1.1 103 X\r\n\r\n" * (MAX_INTERIM_ANSWERS + 1) + sized(b""), "protocol"),
    "bare LF": (b"HTTP/1.1 200 OK\ncontent-length: 0\n\n", "protocol"),
    "folded header": (b"HTTP/1.1 200 OK\r\nx: a\r\n b\r\ncontent-length: 0\r\n\r\n", "protocol"),
    "space before colon": (b"HTTP/1.1 200 OK\r\ncontent-length : 0\r\n\r\n", "protocol"),
    "NUL in a value": (b"HTTP/1.1 200 OK\r\nx: a\0b\r\n\r\n", "protocol"),
    "two lengths": (sized(b"a", b"content-length: 1"), "protocol"),
    "list of lengths": (b"HTTP/1.1 200 OK\r\ncontent-length: 1, 1\r\n\r\na", "protocol"),
    "negative length": (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", "protocol"),
    "huge length": (b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n", "protocol"),
    "length and chunked": (chunked_head(b"content-length: 4") + chunk(b"abcd") + LAST_CHUNK, "protocol"),
    "gzip coding": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nxyz", "protocol"),
    "gzip, chunked": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n" + LAST_CHUNK,
        "protocol",
    ),
    "gzip and chunked": (chunked_head(b"transfer-encoding: gzip"), "protocol"),
    "chunk size in letters": (chunked_head() + b"zz\r\nabc\r\n", "protocol"),
    "chunk size overflow": (chunked_head() + b"f" * 20 + b"\r\nabc", "protocol"),
    "chunk too long": (chunked_head() + b"2\r\nabc\r\n" + LAST_CHUNK, "protocol"),
    "bare LF after chunk": (chunked_head() + b"3\nabc\n0\n\n", "protocol"),
    "length in trailers": (CHUNKED + b"0\r\ncontent-length: 3\r\n\r\n", "protocol"),
    "many headers": (sized(b"", *[b"a: b"] * MAX_HEADERS), "too_large"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_a_malformed_answer_is_an_error_of_its_kind_however_it_is_cut(name, step):
    data, kind = HOSTILE[name]
    outcome = Outcome(*(data[i : i + step] for i in range(0, len(data), step)))
    assert outcome.kind == kind
    assert outcome.message
    assert not outcome.is_complete
    assert not outcome.is_reusable


@pytest.mark.parametrize("step", [1000, 500_000])
@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 " + b"x" * 300_000,
        b"HTTP/1.1 200 OK\r\n" + b"n" * 300_000,
        b"HTTP/1.1 200 OK\r\nx: " + b"v" * 300_000,
        b"HTTP/1.1 200 OK\r\nx: " + b"v" * 300_000 + b"\r\ncontent-length: 3\r\n\r\nabc",
        b"HTTP/1.1 103 X\r\nx: " + b"v" * 300_000,
        chunked_head() + chunk(b"abc") + b"0\r\nx: " + b"v" * 300_000,
        chunked_head() + chunk(b"abc") + b"1;" + b"e" * 300_000,
    ],
    ids=["reason", "name", "value", "value then body", "interim", "trailer", "chunk extension"],
)
def test_endless_heads_trailers_and_extensions_are_too_large(data, step):
    outcome = Outcome(*(data[i : i + step] for i in range(0, len(data), step)), ends=False)
    if step == 500_000 and b"chunked" in data:
        assert not outcome.is_complete  # one read: what it held is already bounded by the read
        return
    assert outcome.kind == "too_large"


def test_a_small_head_with_a_large_body_in_one_read_is_fine():
    assert Outcome(sized(b"x" * 200_000), max_head_bytes=1000).kind is None
    split = sized(b"x" * 200_000)
    assert Outcome(split[:150_000], split[150_000:], max_head_bytes=1000).body == b"x" * 200_000


def test_a_long_stream_of_split_chunk_frames_is_not_taken_for_a_large_head():
    reads = [chunked_head()]
    for _ in range(500):
        reads += [b"3\r\n", b"abc", b"\r\n"]
    assert Outcome(*reads, LAST_CHUNK, max_head_bytes=300).body == b"abc" * 500


def test_what_came_before_the_fault_is_delivered():
    outcome = Outcome(chunked_head() + chunk(b"good") + b"zz\r\n")
    assert (outcome.status, outcome.body, outcome.kind) == (200, b"good", "protocol")


def mutated(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        match rng.randrange(6):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randint(1, 6)]
            case 2:
                data[at:at] = rng.choice(
                    [b"\r\n", b"\0", b"0\r\n\r\n", b": ", b"HTTP/1.1 ", b"-1", b"\xff\xfe"]
                )
            case 3:
                other = rng.choice(list(RECORDED.values()))
                data[at:] = other[rng.randrange(len(other)) :]
            case 4:
                data[at:at] = data[at : at + rng.randint(1, 30)]
            case 5:
                del data[at:]
        if not data:
            data = bytearray(b"H")
    return bytes(data)


@pytest.mark.parametrize("seed", range(20))
def test_mutated_answers_end_in_a_complete_answer_or_an_upstream_error(seed):
    rng = random.Random(seed)
    for _ in range(250):
        data = mutated(rng, rng.choice(list(RECORDED.values())))
        step = rng.choice([1, 3, 10_000])
        outcome = Outcome(*(data[i : i + step] for i in range(0, len(data), step)))
        assert outcome.is_complete is (outcome.kind is None), data
