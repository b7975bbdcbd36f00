import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.dialect import CHAT, COMPLETIONS, MESSAGES, RAW, RESPONSES
from backends.sse import BOM
from backends.tap import HOLD_BYTES, Tap
from backends.usage import Usage
from tests.support.answers import STREAMED, cut, event, stream, usages
from tests.support.properties import STEADY

DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
USED = Usage(10, output_tokens=3)
USAGE_EVENT = event({"id": "c", "model": "m-1", "choices": [], "usage": USAGE})


def chunk(text, **members) -> bytes:
    return event(
        {
            "id": "c",
            "model": "m-1",
            "choices": [{"index": 0, "delta": {"content": text}}],
            "created": 1,
            **members,
        }
    )


def run(dialect, reads, *, strips=False):
    """The tap after the stream, and what it relayed."""
    tap = Tap(dialect, strips_usage=strips)
    relayed = [tap.feed(read) for read in reads]
    return tap, b"".join([*relayed, tap.flush()])


# Whole streams, each dialect


@pytest.mark.parametrize("dialect", STREAMED, ids=lambda d: d.name)
@STEADY
@given(data=st.data())
def test_usage_is_read_wherever_the_reads_are_cut(dialect, data):
    usage = data.draw(usages(dialect))
    texts = data.draw(
        st.lists(st.sampled_from(["hi", ' "usage": {', "error", "é😀", "[DONE]", "\n\n"]), max_size=8)
    )
    body = b"".join(stream(dialect, usage, texts))
    tap, relayed = run(dialect, cut(body, data.draw(st.lists(st.integers(0, 9_999), max_size=12))))
    assert relayed == body
    assert (tap.usage, tap.model, tap.is_complete, tap.error) == (usage, "m-1", True, None)
    assert tap.service_tier == ("standard" if dialect is MESSAGES else "default")


@pytest.mark.parametrize("dialect", [CHAT, RESPONSES, MESSAGES], ids=lambda d: d.name)
def test_a_raw_stream_tells_its_dialect_by_itself(dialect):
    usage = Usage(10, 20, 30, 0, 50, 5)
    tap, _ = run(RAW, stream(dialect, usage, ["a"] * 20))
    assert (tap.usage, tap.is_complete) == (usage, True)


LINE_ENDS = {"lf": b"\n", "crlf": b"\r\n", "cr": b"\r"}


@st.composite
def chat_streams(draw):
    """A chat stream in pieces, of which those that are True are to be taken out."""
    end = draw(st.sampled_from(list(LINE_ENDS.values())))
    prefix = draw(st.sampled_from([b"data: ", b"data:", b"id: 5" + end + b"data: "]))

    def written(document) -> bytes:
        separators = draw(st.sampled_from([(",", ":"), (", ", ": ")]))
        text = json.dumps(document, separators=separators, ensure_ascii=draw(st.booleans()))
        return prefix + text.encode() + end + end

    choice = {
        "index": 0,
        "delta": {"content": draw(st.sampled_from(["a", '"usage":{"x":1}', "é😀", "error"]))},
    }
    kinds = {
        "chunk": (written({"model": "m-1", "choices": [choice]}), False),
        "null usage": (written({"model": "m-1", "choices": [choice], "usage": None}), False),
        "usage with a choice": (written({"model": "m-1", "choices": [choice], "usage": USAGE}), False),
        "no choices": (
            written({"model": "", "choices": [], "prompt_filter_results": [], "usage": None}),
            False,
        ),
        "comment": (b": keep-alive" + end + end, False),
        "comment before": (b": keep-alive" + end, False),
        "empty line": (end, False),
        "lines": (b"data: {" + end + b'data: "choices": [1]}' + end + end, False),
        "not JSON": (b"data: ok" + end + end, False),
        "done": (b"data: [DONE]" + end + end, False),
        "usage": (written({"choices": [], "usage": USAGE, "model": "m-1"}), True),
    }
    start = [(draw(st.sampled_from([b"", BOM])), False)]
    return start + [kinds[name] for name in draw(st.lists(st.sampled_from(list(kinds)), max_size=9))]


@pytest.mark.parametrize("dialect", [CHAT, COMPLETIONS], ids=lambda d: d.name)
@STEADY
@given(pieces=chat_streams(), places=st.lists(st.integers(0, 9_999), max_size=12))
def test_exactly_the_usage_events_are_taken_out_wherever_the_reads_are_cut(dialect, pieces, places):
    body = b"".join(piece for piece, _ in pieces)
    _, relayed = run(dialect, cut(body, places), strips=True)
    assert relayed == b"".join(piece for piece, is_usage in pieces if not is_usage)


@STEADY
@given(pieces=chat_streams(), places=st.lists(st.integers(0, 9_999), max_size=12))
def test_every_byte_is_relayed_at_once_when_nothing_is_to_be_taken_out(pieces, places):
    reads = cut(b"".join(piece for piece, _ in pieces), places)
    tap = Tap(CHAT, strips_usage=False)
    assert [tap.feed(read) for read in reads] == reads
    assert tap.flush() == b""


@pytest.mark.parametrize("end", LINE_ENDS.values(), ids=LINE_ENDS)
def test_no_cut_leaves_a_byte_of_a_usage_event_or_takes_one_of_another(end):
    pieces = [chunk("a"), b": x\n", USAGE_EVENT, chunk("b"), USAGE_EVENT, DONE]
    body, kept = (
        b"".join(some).replace(b"\n", end) for some in (pieces, [p for p in pieces if p is not USAGE_EVENT])
    )
    for place in range(len(body)):
        tap, relayed = run(CHAT, [body[:place], body[place:]], strips=True)
        assert relayed == kept
        assert (tap.usage, tap.is_complete) == (USED, True)


def test_one_byte_at_a_time_is_no_different():
    body = b"".join([chunk("a"), chunk("b"), USAGE_EVENT, DONE])
    tap, relayed = run(CHAT, [bytes([byte]) for byte in body], strips=True)
    assert relayed == body.replace(USAGE_EVENT, b"")
    assert (tap.usage, tap.is_complete) == (USED, True)


# Ordinary chunks


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("dialect", STREAMED, ids=lambda d: d.name)
def test_an_ordinary_chunk_is_relayed_as_the_same_object(dialect, strips):
    tap = Tap(dialect, strips_usage=strips)
    for piece in stream(dialect, USED, ["a", "b", "", "\\", "error", '"'] * 4)[:-2]:
        assert tap.feed(piece) is piece


def test_chunks_that_share_a_read_stay_together():
    tap = Tap(CHAT, strips_usage=True)
    tap.feed(chunk("a"))
    assert tap.feed(chunk("b") + chunk("c")) == chunk("b") + chunk("c")


def test_a_chunk_that_looks_like_all_the_others_may_still_end_the_stream():
    tap = Tap(CHAT, strips_usage=True)
    for _ in range(20):
        tap.feed(chunk("same"))
    assert tap.feed(chunk("same") + USAGE_EVENT + chunk("same")) == chunk("same") * 2
    assert tap.feed(chunk("same") + DONE + chunk("same")) == chunk("same") + DONE + chunk("same")
    assert (tap.usage, tap.is_complete) == (USED, True)


def test_usage_behind_the_text_of_a_familiar_chunk_is_seen():
    tap = Tap(CHAT, strips_usage=False)
    for _ in range(20):
        tap.feed(event({"choices": [{"delta": {"content": "x"}}], "z": [{"q": "y"}]}))
    tap.feed(event({"choices": [{"delta": {"content": "x"}}], "usage": USAGE, "z": [{"q": "y"}]}))
    assert tap.usage == USED


# Usage


def test_usage_in_the_last_chunk_with_a_choice_is_relayed():
    last = chunk("", usage=USAGE)
    tap, relayed = run(CHAT, [chunk("a"), last, DONE], strips=True)
    assert relayed == chunk("a") + last + DONE
    assert tap.usage == USED


def test_of_usage_in_every_chunk_the_last_counts():
    growing = [chunk("a", usage={**USAGE, "completion_tokens": n, "total_tokens": 10 + n}) for n in range(4)]
    tap, _ = run(CHAT, [*growing, DONE])
    assert tap.usage == USED


def test_usage_after_the_chunk_with_a_finish_reason_is_read():
    finish = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    tap, relayed = run(CHAT, [chunk("a"), finish, USAGE_EVENT, DONE], strips=True)
    assert tap.usage == USED
    assert relayed == chunk("a") + finish + DONE


def test_a_null_usage_in_every_chunk_is_left_alone():
    chunks = [chunk("a", usage=None), chunk("b", usage=None)]
    tap, relayed = run(CHAT, [*chunks, USAGE_EVENT, DONE], strips=True)
    assert relayed == b"".join([*chunks, DONE])
    assert tap.usage == USED


def test_groq_tells_usage_in_a_member_of_its_own():
    tap, _ = run(CHAT, [chunk("a", x_groq={"id": "r"}), chunk("", x_groq={"id": "r", "usage": USAGE}), DONE])
    assert (tap.usage, tap.model) == (USED, "m-1")


def test_a_usage_event_that_tells_nothing_is_taken_out_all_the_same():
    empty = event({"choices": [], "usage": {}})
    tap, relayed = run(CHAT, [chunk("a"), empty, DONE], strips=True)
    assert relayed == chunk("a") + DONE
    assert tap.usage is None


def test_the_last_message_delta_counts_with_its_input():
    start = {"model": "m", "usage": {"input_tokens": 531, "output_tokens": 0}}
    told = {
        "input_tokens": 19,
        "cache_read_input_tokens": 512,
        "cache_creation_input_tokens": 0,
        "output_tokens": 8,
    }
    tap, _ = run(
        MESSAGES,
        [
            event({"type": "message_start", "message": start}, "message_start"),
            event({"type": "message_delta", "delta": {}, "usage": told}, "message_delta"),
            event({"type": "message_stop"}, "message_stop"),
        ],
    )
    assert tap.usage == Usage(19, 512, output_tokens=8)
    assert tap.is_complete


@pytest.mark.parametrize(
    "delta",
    [
        {"output_tokens": 8},
        {"output_tokens": 8, "input_tokens": None},
        {"output_tokens": 8, "input_tokens": 0},
    ],
)
def test_a_message_delta_without_a_prompt_leaves_that_of_the_start(delta):
    told = {"input_tokens": 5, "cache_read_input_tokens": 7, "output_tokens": 1, "service_tier": "batch"}
    tap, _ = run(
        MESSAGES,
        [
            event({"type": "message_start", "message": {"model": "m", "usage": told}}),
            event({"type": "message_delta", "usage": delta}),
        ],
    )
    assert (tap.usage, tap.service_tier) == (Usage(5, 7, output_tokens=8), "batch")


def test_an_incomplete_response_is_a_whole_answer_with_usage():
    response = {"model": "m", "usage": {"input_tokens": 10, "output_tokens": 3}, "service_tier": "flex"}
    tap, _ = run(
        RESPONSES, [event({"type": "response.incomplete", "response": response}, "response.incomplete")]
    )
    assert (tap.usage, tap.is_complete, tap.service_tier) == (USED, True, "flex")


def test_usage_at_the_end_of_a_response_of_a_megabyte_is_read():
    events = stream(RESPONSES, USED, ["x" * 1_000_000])
    body = b"".join(events)
    tap, relayed = run(RESPONSES, [body[at : at + 16_384] for at in range(0, len(body), 16_384)])
    assert (tap.usage, tap.is_complete) == (USED, True)
    assert relayed == body


# Ends and errors


def test_a_stream_without_its_end_is_not_complete():
    for dialect in STREAMED:
        tap, _ = run(dialect, stream(dialect, USED, ["a"])[:-1])
        assert not tap.is_complete


def test_done_without_its_empty_line_is_an_end():
    tap, relayed = run(CHAT, [chunk("a"), b"data: [DONE]"], strips=True)
    assert tap.is_complete
    assert relayed == chunk("a") + b"data: [DONE]"


def test_a_usage_event_without_its_empty_line_is_read_and_taken_out():
    tap, relayed = run(CHAT, [chunk("a"), b": x\n" + USAGE_EVENT[:-2]], strips=True)
    assert tap.usage == USED
    assert relayed == chunk("a") + b": x\n"


def test_an_error_followed_by_done_is_not_complete():
    error = {
        "error": {"message": "EngineCore encountered an issue", "type": "InternalServerError", "code": 500}
    }
    tap, relayed = run(CHAT, [chunk("a"), event(error), DONE])
    assert tap.error == json.dumps(error, separators=(",", ":")).encode()
    assert not tap.is_complete
    assert relayed.endswith(event(error) + DONE)


@pytest.mark.parametrize(
    ("dialect", "failure"),
    [
        (CHAT, event({"error": {"message": "x"}})),
        (CHAT, event({"message": "x"}, "error")),
        (CHAT, b"event: error\ndata: gone\n\n"),
        (CHAT, chunk("", error={"code": 502})),
        (MESSAGES, event({"type": "error", "error": {"type": "overloaded_error", "message": "x"}}, "error")),
        (RESPONSES, event({"type": "error", "code": "x", "message": "x"}, "error")),
        (RESPONSES, event({"type": "response.failed", "response": {"error": {"code": "x"}, "usage": None}})),
        (RESPONSES, event({"error": {"message": "x"}})),
        (RAW, event({"error": {"message": "x"}})),
    ],
)
def test_an_error_in_band_is_noticed_in_each_dialect(dialect, failure):
    for place in (0, 3):
        events = stream(CHAT if dialect is RAW else dialect, USED, ["a", "b"])
        events.insert(place, failure)
        tap, relayed = run(dialect, events)
        assert tap.error is not None
        assert not tap.is_complete
        assert relayed == b"".join(events)


def test_of_two_errors_the_first_is_kept():
    tap, _ = run(CHAT, [event({"error": {"code": 1}}), event({"error": {"code": 2}})])
    assert tap.error == b'{"error":{"code":1}}'


def test_a_failed_response_may_tell_what_it_used():
    response = {"error": {"code": "x"}, "usage": {"input_tokens": 10, "output_tokens": 3}}
    tap, _ = run(RESPONSES, [event({"type": "response.failed", "response": response})])
    assert tap.usage == USED


def test_talk_about_errors_is_no_error():
    texts = ["error", ' {"error": {}}', "event: error", "[DONE]", '"usage":{']
    for dialect in STREAMED:
        tap, _ = run(dialect, stream(dialect, USED, texts))
        assert tap.error is None


def test_done_as_the_text_of_a_chunk_is_no_end():
    assert not run(CHAT, [chunk("data: [DONE]\n\n")])[0].is_complete


@pytest.mark.parametrize(
    "data", [b"data: {\n\n", b"data: [1]\n\n", b"data: " + b"[" * 100_000 + b"\n\n", b"\xff\n\n"]
)
def test_events_that_cannot_be_read_are_relayed(data):
    for dialect in (*STREAMED, RAW):
        tap, relayed = run(dialect, [data, DONE], strips=dialect.usage_on_request)
        assert relayed == data + DONE
        assert tap.usage is None


# Holding back


def test_only_the_part_of_an_event_that_is_not_whole_is_held_back():
    tap = Tap(CHAT, strips_usage=True)
    whole, part = chunk("a"), chunk("b")
    assert tap.feed(whole + part[:20]) == whole
    assert tap.feed(part[20:40]) == b""
    assert tap.feed(part[40:]) == part


def test_nothing_is_held_back_beyond_the_limit():
    long = chunk("x" * (4 * HOLD_BYTES))
    tap = Tap(CHAT, strips_usage=True)
    at = held = 0
    relayed = b""
    while at < len(long):
        relayed += tap.feed(long[at : at + 5_000])
        at = min(len(long), at + 5_000)
        held = max(held, at - len(relayed))
    assert relayed == long
    assert held <= HOLD_BYTES


@pytest.mark.parametrize("read_bytes", [1_000, HOLD_BYTES, 10**9])
def test_an_event_too_long_to_hold_is_relayed_however_it_arrives(read_bytes):
    usage = event({"choices": [], "usage": USAGE, "padding": "x" * HOLD_BYTES})
    body = chunk("a") + usage + DONE
    tap, relayed = run(
        CHAT, [body[at : at + read_bytes] for at in range(0, len(body), read_bytes)], strips=True
    )
    assert relayed == body
    assert tap.usage == USED


# Estimates


def test_a_cut_stream_is_estimated_by_its_events_and_its_text():
    words = ["word ", "and ", "so "] * 100
    for dialect in STREAMED:
        events = stream(dialect, Usage(900, output_tokens=300), words)[:280]
        tap, _ = run(dialect, events)
        estimate = tap.estimate(prompt_bytes=4_000)
        assert estimate.output_tokens == pytest.approx(277, rel=0.15)
        assert estimate.prompt_tokens == (900 if dialect is MESSAGES else 1_000)


def test_the_estimate_does_not_depend_on_how_chunks_were_read():
    events = stream(CHAT, USED, ["some words of text "] * 400)[:-2]
    one_by_one = run(CHAT, events)[0].estimate(0).output_tokens
    in_one = run(CHAT, [b"".join(events)])[0].estimate(0).output_tokens
    odd = run(CHAT, cut(b"".join(events), range(0, 60_000, 777)))[0].estimate(0).output_tokens
    assert one_by_one == pytest.approx(400 * 19 / 4, rel=0.1)
    assert in_one == pytest.approx(one_by_one, rel=0.1)
    assert odd == pytest.approx(one_by_one, rel=0.1)


def test_tool_calls_and_reasoning_count_as_output():
    call = {"index": 0, "function": {"arguments": '{"city":"'}}
    deltas = [{"reasoning_content": "hmm ", "reasoning": "hmm "}] * 40 + [{"tool_calls": [call]}] * 40
    tap, _ = run(CHAT, [event({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas])
    assert tap.estimate(0).output_tokens == pytest.approx(40 + 40 * 9 / 4, rel=0.3)


def test_one_event_longer_than_the_sample_is_estimated_by_its_bytes():
    tap, _ = run(CHAT, [chunk(""), chunk("x" * 40_000)])
    assert tap.estimate(0).output_tokens == pytest.approx(10_000, rel=0.05)


def test_an_estimate_begins_where_the_last_usage_was_told():
    tap, _ = run(CHAT, [chunk("a", usage=USAGE), *[chunk("b")] * 5])
    assert tap.estimate(10_000) == Usage(10, output_tokens=8)


def test_usage_that_was_told_in_full_is_not_estimated_over():
    for dialect in STREAMED:
        events = stream(dialect, USED, ["a"] * 9)
        tap, _ = run(dialect, events if dialect is RESPONSES else events[:-1])
        assert tap.estimate(10_000) == USED


def test_a_stream_without_a_word_used_only_its_input():
    assert Tap(CHAT, strips_usage=False).estimate(400) == Usage(100)
    assert run(CHAT, [chunk("")])[0].estimate(400) == Usage(100)


def test_what_is_said_twice_is_not_estimated_twice():
    events = stream(RESPONSES, USED, ['say "it" '] * 200)[:-1]
    assert b"output_text.done" in events[-1]
    assert run(RESPONSES, events)[0].estimate(0).output_tokens == pytest.approx(450, rel=0.02)


def test_what_is_kept_of_a_stream_is_bounded():
    tap = Tap(CHAT, strips_usage=True)
    for n in range(2_000):
        tap.feed(chunk(f'"{n}" and more'))
    assert sum(map(len, tap._sample)) <= 4_096
