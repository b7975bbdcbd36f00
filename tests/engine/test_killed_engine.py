"""Engines that die at work. Their tests are the last of the session, and in this order: nothing is alive after them."""

import asyncio
import os
import signal

import openai
import pytest

from tests.engine.calls import ENDLESS, ask, said, until

pytestmark = pytest.mark.engine


async def test_a_replica_that_hangs_is_killed_and_breaks_its_own_streams_only(
    async_client, client, gateway, replicas, sessions
):
    """Its `/health` is well all the while. What was not streamed had nothing relayed yet: the other one answers it."""
    broken = await ask(async_client, session=sessions[0], stream=True, **ENDLESS)
    spared = await ask(async_client, session=sessions[1], stream=True, **(ENDLESS | {"max_tokens": 300}))
    while not said([await anext(broken)]):
        pass
    os.kill(replicas[0].core(), signal.SIGSTOP)
    whole = asyncio.ensure_future(ask(async_client, session=sessions[0], **(ENDLESS | {"max_tokens": 60})))
    in_flight = 'headgate_requests_in_flight{endpoint="gpu/0"}'
    await asyncio.to_thread(until, lambda: gateway.metrics()[in_flight] == 2)
    assert replicas[0].health() == 200
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
    assert answer.usage.completion_tokens == row["output_tokens"] == 60
    events = [event async for event in spared]
    assert events[-1].choices[0].finish_reason == "length"
    row = gateway.row(spared.response.headers["x-request-id"])
    assert (row["ended"], row["is_estimated"], row["output_tokens"]) == ("completed", 0, 300)


def test_the_other_replica_keeps_serving_the_killed_ones_sessions(client, gateway, replicas, sessions):
    until(lambda: replicas[0].state == "backing_off")
    assert "no progress for" in gateway.engines()["gpu/0"]["cause"]
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
    os.kill(replicas[1].core(), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="EngineCore"):
        list(stream)
    row = gateway.row(stream.response.headers["x-request-id"])
    assert (row["ended"], row["error_kind"], row["is_estimated"]) == ("incomplete", "stream_error", 1)
    until(lambda: replicas[1].state == "backing_off")


def test_without_any_replica_the_client_hears_it_and_pays_nothing(client, gateway):
    patient = client.with_options(default_headers={"x-headgate-on-full": "wait"})
    for fields in ({}, {"stream": True}):
        with pytest.raises(openai.InternalServerError) as caught:
            ask(patient, **fields)
        assert (caught.value.status_code, caught.value.code) == (503, "no_endpoint")
        row = gateway.row(caught.value.request_id)
        assert (row["ended"], row["error_kind"], row["cost_nanousd"]) == ("denied", "no_endpoint", 0)
