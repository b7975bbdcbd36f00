"""A real engine whose queue is full says so at once: the other replica helps out, and without one the client is told."""

import asyncio

import openai
import pytest

from tests.engine.calls import ENDLESS, ask, occupy, until

pytestmark = pytest.mark.engine


async def test_the_other_replica_answers_for_a_full_one_and_two_full_ones_are_said_to_be(
    async_client, gateway, replicas, sessions
):
    held = []
    try:
        held.append(await fill(async_client, replicas[0], sessions[0]))
        helped = await ask(async_client, session=sessions[0])
        held.append(await fill(async_client, replicas[1], sessions[1]))
        with pytest.raises(openai.InternalServerError) as caught:
            await ask(async_client, session=sessions[0])
    finally:
        for streams, waiting in held:
            await empty(streams, waiting)
    row = gateway.row(helped._request_id)
    assert (row["endpoint"], row["attempts"], row["status"]) == ("gpu/1", 2, 200)
    assert caught.value.status_code == 503
    row = gateway.row(caught.value.request_id)
    assert (row["status"], row["attempts"], row["cost_nanousd"]) == (503, 2, 0)
    for replica in replicas:
        await asyncio.to_thread(until, lambda r=replica: r.metric("num_requests_running") == 0)


async def fill(client, replica, session):
    """Four requests that run and two that wait for their turn."""
    streams = await occupy(client, session, 4)
    waiting = []
    for expected in (1, 2):
        waiting.append(asyncio.ensure_future(ask(client, session=session, **ENDLESS)))
        await asyncio.to_thread(until, lambda n=expected: replica.metric("num_requests_waiting") == n)
    return streams, waiting


async def empty(streams, waiting):
    for call in waiting:
        call.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for stream in streams:
        await stream.close()
