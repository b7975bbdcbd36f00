import re

from hypothesis import given
from hypothesis import strategies as st

from backends.sse import BOM, Event, Splitter, decode
from tests.support.answers import cut
from tests.support.properties import STEADY

LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
LINES = st.one_of(
    st.sampled_from(
        [b"", b":", b": keep-alive", b"data", b"data:", b"data: ", b"event: ping", b"id: 7", b"retry: 10"]
    ),
    st.binary(max_size=12).map(lambda value: b"data: " + re.sub(rb"[\r\n]", b"", value)),
    st.text("aé😀: ", max_size=6).map(lambda value: b"data:" + value.encode()),
)
STREAMS = st.lists(st.tuples(LINES, LINE_ENDS), max_size=24).map(
    lambda lines: b"".join(a + b for a, b in lines)
)


def events_of(reads: list[bytes]) -> list[Event]:
    splitter = Splitter()
    raw = [event for read in reads for event in splitter.feed(read)]
    return [event for event in map(decode, raw) if event is not None]


def read_by_the_letter(stream: bytes) -> list[Event]:
    """The standard's algorithm over the whole stream, line by line."""
    lines = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    events, name, data = [], b"", []
    for line in lines:
        if not line:
            if data:
                events.append(Event(name, b"\n".join(data)))
            name, data = b"", []
        elif line.startswith(b"data:") or line == b"data":
            data.append(line[5:].removeprefix(b" "))
        elif line.startswith(b"event:"):
            name = line[6:].removeprefix(b" ")
    return events


@STEADY
@given(STREAMS, st.lists(st.integers(0, 400), max_size=12))
def test_events_are_the_same_wherever_the_reads_are_cut(stream, places):
    assert events_of(cut(stream, places)) == read_by_the_letter(stream)


@STEADY
@given(STREAMS, st.lists(st.integers(0, 400), max_size=12))
def test_the_pieces_and_the_rest_are_what_was_fed(stream, places):
    splitter = Splitter()
    pieces = [event for read in cut(stream, places) for event in splitter.feed(read)]
    assert b"".join(pieces) + splitter.rest() == stream


@STEADY
@given(STREAMS)
def test_one_byte_at_a_time_is_no_different(stream):
    assert events_of([bytes([byte]) for byte in stream]) == read_by_the_letter(stream)


def test_an_event_is_out_as_soon_as_its_empty_line_is():
    splitter = Splitter()
    assert splitter.feed(b"data: a\n") == []
    assert splitter.feed(b"\nda") == [b"data: a\n\n"]
    assert not splitter.is_between_events
    assert splitter.feed(b"ta: b\r\r") == [b"data: b\r\r"]


def test_the_second_half_of_a_crlf_belongs_to_the_event_before():
    splitter = Splitter()
    assert splitter.feed(b"data: a\r\n\r") == [b"data: a\r\n\r"]
    assert not splitter.is_between_events
    assert splitter.feed(b"\ndata: b\r\n\r\n") == [b"\n", b"data: b\r\n\r\n"]


def test_a_crlf_is_one_line_end_not_two():
    assert Splitter().feed(b"data: a\r\ndata: b\r\n\r\n") == [b"data: a\r\ndata: b\r\n\r\n"]


def test_a_line_of_a_megabyte_is_one_event():
    line = b"data: " + b"x" * 1_000_000 + b"\n\n"
    splitter = Splitter()
    assert [e for at in range(0, len(line), 999) for e in splitter.feed(line[at : at + 999])] == [line]


def test_an_endless_line_is_cut_at_the_limit():
    splitter = Splitter(limit_bytes=100)
    pieces = [event for _ in range(30) for event in splitter.feed(b"x" * 10)]
    assert [len(piece) for piece in pieces] == [110, 110]
    assert splitter.pending_bytes == 80


def test_a_byte_order_mark_before_the_first_event_is_not_part_of_it():
    assert decode(BOM + b"data: a\n\n") == Event(b"", b"a")


def test_data_lines_are_joined_and_one_leading_space_goes():
    assert decode(b"event: x\ndata:a\ndata:  b\ndata\n\n") == Event(b"x", b"a\n b\n")


def test_an_event_without_data_is_none():
    assert decode(b": comment\nretry: 3\n\n") is None
