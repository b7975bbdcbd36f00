"""A client that leaves stops the upstream, in every phase: SDKs cancel by closing the connection and in no other way."""

import asyncio
import time

import anthropic
import openai
import pytest

from tests.e2e.raw import CHAT, EMBEDDINGS, MESSAGES, RESPONSES, USER, called, request
from tests.support import recordings
from tests.support.rawcli import RawClient
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e

LIMIT_S = 2.5  # ten times what it takes on a busy machine
PATIENCE_S = 1.0  # of a client that gives up: by then its request is at the upstream


def assert_quick(upstream, leave, phase):
    """`leave` makes a request and goes; the upstream must notice."""
    leave()
    left_at = time.perf_counter()
    record = upstream.wait_for()
    assert upstream.wait_end(record) == "peer gone"
    assert record.ended_at - left_at < LIMIT_S, phase


def test_closing_a_chat_stream_midway_stops_the_upstream(client, gateway, upstream):
    ids = []

    def leave():
        stream = client.chat.completions.create(model="acme/hang-after-3", messages=USER, stream=True)
        next(iter(stream))
        ids.append(stream.response.headers["x-request-id"])
        stream.close()

    assert_quick(upstream, leave, "mid-stream")
    row = gateway.row(ids[-1])
    assert (row["ended"], row["status"], row["is_estimated"]) == ("client_gone", 200, 1)
    assert row["cost_nanousd"] > 0


def test_closing_a_responses_stream_midway_stops_the_upstream(client, upstream):
    def leave():
        stream = client.responses.create(model="acme/hang-after-5", input="hi", stream=True)
        next(iter(stream))
        stream.close()

    assert_quick(upstream, leave, "mid-stream")


def test_closing_a_messages_stream_midway_stops_the_upstream(claude, gateway, upstream):
    ids = []

    def leave():
        with claude.messages.stream(model="claude/hang-after-5", messages=USER, max_tokens=9) as stream:
            next(stream.text_stream)
            ids.append(stream.request_id)

    assert_quick(upstream, leave, "mid-stream")
    row = gateway.row(ids[-1])
    assert (row["ended"], row["is_estimated"]) == ("client_gone", 1)
    assert row["input_tokens"] == 25  # told by the first event


def test_a_client_that_hangs_up_at_the_last_event_has_its_whole_answer(client, gateway, upstream):
    """The SDK does so at `[DONE]`; the end of the body may come a moment later."""
    events = recordings.chat_events("hi")
    upstream.script("chat", Answer.of_events(events).hang_after(len(events)))
    stream = client.chat.completions.create(model="acme/any", messages=USER, stream=True)
    assert list(stream)
    assert upstream.wait_end(upstream.wait_for()) == "peer gone"
    row = gateway.row(stream.response.headers["x-request-id"])
    assert (row["ended"], row["status"], row["is_estimated"]) == ("completed", 200, 0)
    assert row["output_tokens"] == 8


def test_a_client_that_hangs_up_at_the_upstreams_error_is_not_the_one_that_broke_off(
    client, gateway, upstream
):
    stream = client.chat.completions.create(
        model="acme/error-after-3+hang-after-4", messages=USER, stream=True
    )
    with pytest.raises(openai.APIError, match="The server had an error"):
        list(stream)
    assert upstream.wait_end(upstream.wait_for()) == "peer gone"
    row = gateway.row(stream.response.headers["x-request-id"])
    assert (row["ended"], row["error_kind"], row["is_estimated"]) == ("incomplete", "stream_error", 1)


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_gives_up_before_the_first_byte_stops_the_upstream(
    client, gateway, upstream, is_stream
):
    tag = f"left-before-the-head-{is_stream}"
    impatient = client.with_options(timeout=PATIENCE_S, default_headers={"x-headgate-tags": tag})

    def leave():
        with pytest.raises(openai.APITimeoutError):
            impatient.chat.completions.create(model="acme/hang", messages=USER, stream=is_stream)

    assert_quick(upstream, leave, "before the head")
    deadline = time.monotonic() + 30
    while not (rows := [row for row in gateway.rows() if tag in row["tags"]]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (row,) = rows
    assert (row["ended"], row["status"], row["is_estimated"]) == ("client_gone", 499, 1)
    assert row["ttft_us"] is None


def test_a_client_that_gives_up_in_the_middle_of_an_unstreamed_body_stops_the_upstream(client, upstream):
    def leave():
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=PATIENCE_S).chat.completions.create(
                model="acme/huge-line+split-400000+hang-after-2+claims-2000000", messages=USER
            )

    assert_quick(upstream, leave, "inside the body")


def test_a_message_given_up_stops_the_upstream(claude, upstream):
    def leave():
        with pytest.raises(anthropic.APITimeoutError):
            claude.with_options(timeout=PATIENCE_S).messages.create(
                model="claude/hang", messages=USER, max_tokens=9
            )

    assert_quick(upstream, leave, "before the head")


async def test_a_cancelled_task_of_the_asynchronous_sdk_stops_the_upstream(async_client, upstream):
    call = asyncio.ensure_future(async_client.chat.completions.create(model="acme/hang", messages=USER))
    record = await asyncio.to_thread(upstream.wait_for)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    left_at = time.perf_counter()
    assert await asyncio.to_thread(upstream.wait_end, record) == "peer gone"
    assert record.ended_at - left_at < LIMIT_S


@pytest.mark.parametrize("how", ["close", "reset", "half_close"])
@pytest.mark.parametrize(
    ("path", "model"),
    [(CHAT, "acme/hang"), (EMBEDDINGS, "acme/hang"), (RESPONSES, "acme/hang"), (MESSAGES, "claude/hang")],
)
async def test_however_a_client_goes_the_upstream_hears_of_it(gateway, upstream, path, model, how):
    upstream.script("embeddings", Answer.of_json({}).hang_before_head())  # these have no variations by name
    connection = await RawClient.connect(gateway.port)
    await connection.send(request(path, called(path, model)))
    record = await asyncio.to_thread(upstream.wait_for)
    getattr(connection, how)()
    assert await asyncio.to_thread(upstream.wait_end, record) == "peer gone"
    connection.close()


def test_the_load_of_requests_that_were_left_is_given_back(client, gateway, upstream):
    def in_flight():
        return gateway.metrics()['headgate_requests_in_flight{endpoint="acme"}']

    stream = client.chat.completions.create(model="acme/hang-after-3", messages=USER, stream=True)
    deadline = time.monotonic() + 30
    while in_flight() != 1:
        assert time.monotonic() < deadline
    stream.close()
    upstream.wait_end(upstream.wait_for())
    while in_flight():
        assert time.monotonic() < deadline + 30
