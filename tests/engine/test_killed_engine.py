"""Engines that die at work. Their tests are the last of the session, and in this order: nothing is alive after them."""

import asyncio

import openai
import pytest

from tests.engine.calls import ENDLESS, ask, said, until

pytestmark = pytest.mark.engine


async def test_a_killed_replica_breaks_its_own_streams_only(
    async_client, client, gateway, replicas, sessions
):
    """What was not streamed had nothing relayed yet: the other replica answers it."""
    broken = await ask(async_client, session=sessions[0], stream=True, **ENDLESS)
    spared = await ask(async_client, session=sessions[1], stream=True, **(ENDLESS | {"max_tokens": 300}))
    whole = asyncio.ensure_future(ask(async_client, session=sessions[0], **(ENDLESS | {"max_tokens": 600})))
    while not said([await anext(broken)]):
        pass
    await asyncio.to_thread(until, lambda: replicas[0].metric("num_requests_running") == 2)
    replicas[0].kill()
    with pytest.raises(openai.APIError) as caught:
        async for _ in broken:
            pass
    assert caught.value.code == "upstream_incomplete"
    row = gateway.row(broken.response.headers["x-request-id"])
    assert (row["endpoint"], row["ended"], row["status"]) == ("gpu/0", "incomplete", 200)
    assert (row["error_kind"], row["is_estimated"]) == ("incomplete", 1)
    assert row["output_tokens"] > 0
    assert row["cost_nanousd"] == row["input_tokens"] * 1000 + row["output_tokens"] * 4000

    answer = await whole
    row = gateway.row(answer._request_id)
    assert (row["endpoint"], row["attempts"], row["ended"]) == ("gpu/1", 2, "completed")
    assert answer.usage.completion_tokens == row["output_tokens"] == 600
    events = [event async for event in spared]
    assert events[-1].choices[0].finish_reason == "length"
    row = gateway.row(spared.response.headers["x-request-id"])
    assert (row["ended"], row["is_estimated"], row["output_tokens"]) == ("completed", 0, 300)


def test_the_other_replica_keeps_serving_the_killed_ones_sessions(client, gateway, replicas, sessions):
    assert not replicas[0].is_alive()
    for session in (sessions[0], "", "", sessions[1]):
        row = gateway.row(ask(client, session=session)._request_id)
        assert (row["endpoint"], row["status"]) == ("gpu/1", 200)
    streamed = ask(client, session=sessions[0], stream=True)
    assert said(list(streamed))


def test_an_engine_that_dies_behind_its_own_server_is_not_taken_for_the_end_of_an_answer(
    client, gateway, replicas, sessions
):
    """vLLM's server then sends an error in band, and `[DONE]` after it."""
    stream = ask(client, session=sessions[1], stream=True, **ENDLESS)
    while not said([next(stream)]):
        pass
    replicas[1].kill_engine()
    with pytest.raises(openai.APIError, match="EngineCore"):
        list(stream)
    row = gateway.row(stream.response.headers["x-request-id"])
    assert (row["ended"], row["error_kind"], row["is_estimated"]) == ("incomplete", "stream_error", 1)
    until(lambda: not replicas[1].is_alive(), within_s=30)


def test_without_any_replica_the_client_hears_it_and_pays_nothing(client, gateway):
    for fields in ({}, {"stream": True}):
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client, **fields)
        assert caught.value.status_code == 502
        row = gateway.row(caught.value.request_id)
        assert (row["ended"], row["error_kind"], row["cost_nanousd"]) == ("upstream_failed", "connect", 0)
