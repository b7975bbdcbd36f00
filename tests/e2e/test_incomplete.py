"""A stream that broke off never looks complete: the client gets an error, the row says so and is an estimate."""

import json

import anthropic
import httpx2
import openai
import pytest

from tests.e2e.conftest import POSITIVE
from tests.e2e.raw import CHAT, COMPLETIONS, MESSAGES, RESPONSES, USER, ask, called
from tests.support import recordings
from tests.support.catalogue import answer_for
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e

DIALECTS = {CHAT: "chat", COMPLETIONS: "completions", RESPONSES: "responses", MESSAGES: "messages"}
# How many events come before the break: some of them with text; and how many pieces of 50 bytes.
EVENTS = {CHAT: 3, COMPLETIONS: 2, RESPONSES: 6, MESSAGES: 5}
PIECES = {CHAT: 16, COMPLETIONS: 7, RESPONSES: 61, MESSAGES: 16}
# What is done then, and what of it the client is told.
BREAKS = {
    "cut-after-N": "upstream_incomplete",
    "reset-after-N": "upstream_incomplete",
    "ending-after-N": "upstream_incomplete",
    "close-framed+ending-after-N": "upstream_incomplete",
    "hang-after-N": "upstream_idle_timeout",
}
MIDWAY = [
    "split-50+cut-after-N",
    "split-50+reset-after-N",
    "split-50+hang-after-N",
    "crlf+split-50+cut-after-N",
]
THE_END = (b"[DONE]", b"response.completed", b"message_stop", b'"finish_reason":"stop"')


def placed(path, variation):
    """The variation with its break in the right place for the dialect."""
    return variation.replace("N", str((PIECES if "split" in variation else EVENTS)[path]))


def model_of(path, variation):
    """Of providers that give up on a stalled stream soon."""
    return f"{'slow-claude' if path == MESSAGES else 'slow'}/{placed(path, variation)}"


def sent(path, variation, **fields):
    """All that the upstream sends to such a call."""
    return answer_for(DIALECTS[path], {"model": placed(path, variation), "stream": True, **fields}).body


def cut(kind):
    """What the row of a stream says that broke off after some text."""
    return {
        "ended": "incomplete",
        "status": 200,
        "error_kind": kind,
        "is_estimated": 1,
        "input_tokens": POSITIVE,
        "output_tokens": POSITIVE,
        "cost_nanousd": POSITIVE,
    }


async def streamed(gateway, path, variation, **fields):
    return await ask(gateway, path, called(path, model_of(path, variation), stream=True, **fields))


@pytest.mark.parametrize("variation", BREAKS)
@pytest.mark.parametrize("path", DIALECTS)
async def test_21_a_stream_cut_between_events_ends_with_an_error_in_band_and_without_its_last_chunk(
    gateway, due, path, variation
):
    answer = await streamed(gateway, path, variation)
    relayed = sent(path, variation)
    assert answer.body.startswith(relayed)
    assert not answer.is_complete
    name, data = sse_of(answer.body[len(relayed) :])
    code = BREAKS[variation]
    if path == MESSAGES:
        assert (name, data["type"], data["error"]["type"]) == ("error", "error", "api_error")
    elif path == RESPONSES:
        assert (name, data["type"], data["code"]) == ("error", "error", code)
    else:
        assert (name, data["error"]["code"], data["error"]["type"]) == (None, code, "server_error")
    assert not any(end in answer.body for end in THE_END)
    due(answer.headers["x-request-id"], **cut(_kind(variation)))


def sse_of(event):
    """The name and the data of exactly one event."""
    assert event.endswith(b"\n\n")
    assert event.count(b"\n\n") == 1
    fields = dict(line.split(": ", 1) for line in event.decode().strip().split("\n"))
    return fields.get("event"), json.loads(fields["data"])


def _kind(variation):
    if "hang" in variation:
        return "idle_timeout"
    return "incomplete" if "cut" in variation or "reset" in variation else ""


@pytest.mark.parametrize("variation", MIDWAY)
@pytest.mark.parametrize("path", DIALECTS)
async def test_a_stream_cut_inside_an_event_stops_there_and_nothing_is_glued_to_it(
    gateway, due, path, variation
):
    answer = await streamed(gateway, path, variation, stream_options={"include_usage": True})
    assert answer.body == sent(path, variation, stream_options={"include_usage": True})
    assert not answer.body.endswith((b"\n\n", b"\r\n\r\n"))
    assert not answer.is_complete
    due(answer.headers["x-request-id"], **cut(_kind(variation)))


@pytest.mark.parametrize("variation", ["cut-after-N", "split-50+cut-after-N"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_cut_is_seen_as_one_while_the_usage_event_is_looked_for(gateway, due, path, variation):
    """The gateway asked for usage, so it holds back what may become that event."""
    answer = await streamed(gateway, path, variation)
    whole, _, rest = sent(path, variation).rpartition(b"\n\n")
    assert not answer.is_complete
    assert answer.body.startswith(whole + b"\n\n")
    assert rest == b"" or answer.body == sent(path, variation)
    due(answer.headers["x-request-id"], **cut("incomplete"))


@pytest.mark.parametrize("variation", BREAKS)
def test_the_openai_sdk_raises_when_a_chat_or_a_completion_breaks_off(client, variation):
    chat = client.chat.completions.create(model=model_of(CHAT, variation), messages=USER, stream=True)
    completion = client.completions.create(model=model_of(COMPLETIONS, variation), prompt="hi", stream=True)
    for stream, path in ((chat, CHAT), (completion, COMPLETIONS)):
        seen = []
        with pytest.raises(openai.APIError) as caught:
            seen.extend(stream)
        assert caught.value.code == BREAKS[variation]
        assert len(seen) == EVENTS[path]


@pytest.mark.parametrize("variation", BREAKS)
def test_the_openai_sdk_raises_when_a_response_breaks_off(client, variation):
    with pytest.raises(openai.APIError) as caught:
        list(client.responses.create(model=model_of(RESPONSES, variation), input="hi", stream=True))
    assert caught.value.code == BREAKS[variation]


@pytest.mark.parametrize("variation", BREAKS)
def test_the_anthropic_sdk_raises_when_a_message_breaks_off(claude, variation):
    with (
        pytest.raises(anthropic.APIStatusError) as caught,
        claude.messages.stream(model=model_of(MESSAGES, variation), messages=USER, max_tokens=9) as stream,
    ):
        stream.until_done()
    assert caught.value.type == "api_error"


@pytest.mark.parametrize("variation", MIDWAY)
def test_the_sdks_raise_when_a_stream_is_cut_inside_an_event(client, claude, variation):
    for stream in (
        client.chat.completions.create(model=model_of(CHAT, variation), messages=USER, stream=True),
        client.responses.create(model=model_of(RESPONSES, variation), input="hi", stream=True),
        claude.messages.create(model=model_of(MESSAGES, variation), messages=USER, max_tokens=9, stream=True),
    ):
        with pytest.raises(
            (httpx2.RemoteProtocolError, openai.APIConnectionError, anthropic.APIConnectionError)
        ):
            list(stream)


@pytest.mark.parametrize("variation", ["error-after-3", "error-done-after-3"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_an_upstreams_own_error_in_band_is_relayed_and_not_taken_for_an_end(
    gateway, due, client, path, variation
):
    """vLLM sends `[DONE]` after it."""
    answer = await streamed(gateway, path, variation)
    assert answer.body == sent(path, variation)
    assert answer.is_complete  # as the upstream framed it: the error is the upstream's own word
    due(answer.headers["x-request-id"], **cut("stream_error"))
    with pytest.raises(openai.APIError, match="The server had an error"):
        list(client.chat.completions.create(model=f"slow/{variation}", messages=USER, stream=True))


async def test_an_upstreams_own_error_event_in_a_message_is_relayed(gateway, due, claude):
    answer = await streamed(gateway, MESSAGES, "error-after-4")
    assert answer.body.endswith(recordings.error_event("anthropic"))
    due(
        answer.headers["x-request-id"], **cut("stream_error") | {"input_tokens": 25}
    )  # as the first event told
    with pytest.raises(anthropic.APIStatusError) as caught:
        list(claude.messages.create(model="claude/error-after-4", messages=USER, max_tokens=9, stream=True))
    assert caught.value.type == "overloaded_error"


async def test_a_response_that_failed_is_relayed_and_billed_for_what_it_used(gateway, upstream):
    upstream.script("responses", Answer.of_events(recordings.response_events(end="failed")))
    answer = await ask(gateway, RESPONSES, called(RESPONSES, "acme/any", stream=True))
    assert answer.is_complete
    assert answer.body.count(b"event: response.failed") == 1
    row = gateway.row(answer.headers["x-request-id"])
    assert (row["ended"], row["error_kind"], row["output_tokens"]) == ("incomplete", "stream_error", 8)


async def test_a_response_cut_by_its_token_limit_is_complete(gateway, upstream):
    upstream.script("responses", Answer.of_events(recordings.response_events(end="incomplete")))
    answer = await ask(gateway, RESPONSES, called(RESPONSES, "acme/any", stream=True))
    row = gateway.row(answer.headers["x-request-id"])
    assert (answer.is_complete, row["ended"], row["is_estimated"]) == (True, "completed", 0)


async def test_an_event_that_is_not_json_is_relayed_and_breaks_nothing(gateway, client):
    answer = await ask(gateway, CHAT, called(CHAT, "acme/bad-json-after-2", stream=True))
    assert b"data: {not json\n\n" in answer.body
    assert answer.is_complete
    assert gateway.row(answer.headers["x-request-id"])["output_tokens"] == 8


@pytest.mark.parametrize("path", [path for path in DIALECTS if path != COMPLETIONS])
async def test_a_stream_that_broke_off_before_it_said_anything_is_free(gateway, due, path):
    answer = await ask(gateway, path, called(path, f"{model_of(path, 'cut-after-1')}", stream=True))
    assert not answer.is_complete
    due(answer.headers["x-request-id"], ended="incomplete", status=200, cost_nanousd=0)


@pytest.mark.parametrize("path", DIALECTS)
async def test_a_stream_without_a_single_byte_is_an_error_that_costs_nothing(gateway, due, path):
    answer = await ask(gateway, path, called(path, f"{model_of(path, 'cut-after-0')}", stream=True))
    assert answer.status == 502
    due(answer.headers["x-request-id"], ended="upstream_failed", status=502, cost_nanousd=0)


async def test_a_cut_answer_costs_what_was_delivered_and_no_more(gateway, upstream):
    """Four bytes of text are a token; the first event of a chat has none. The prompt is estimated, too."""
    said = recordings.chat_events("abc " * 60, tokens=None)
    ids = []
    for events in (3, 23, 43):
        upstream.script("chat", Answer.of_events(said).cut_after(events))
        answer = await ask(gateway, CHAT, called(CHAT, "acme/any", stream=True))
        ids.append(answer.headers["x-request-id"])
    rows = [gateway.row(request_id) for request_id in ids]
    assert [row["output_tokens"] for row in rows] == pytest.approx(
        [2, 22, 42], abs=3
    )  # a sample stands for all
    for row in rows:
        assert row["cost_nanousd"] == row["input_tokens"] * 2500 + row["output_tokens"] * 10_000
