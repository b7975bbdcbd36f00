"""The class of a request is what a real engine schedules by, once it is full."""

import asyncio

import openai
import pytest

from tests.engine.calls import ENDLESS, ask, occupy, until
from tests.engine.conftest import BULK_KEY, INTERACTIVE_KEY
from tests.engine.pools import session_at

pytestmark = pytest.mark.engine
# The client's own word would put both first.
WANTED = {
    "stream": True,
    "max_tokens": ENDLESS["max_tokens"],
    "extra_body": {"ignore_eos": True, "priority": -1000},
}


async def test_of_two_that_wait_in_an_engine_the_interactive_one_goes_first(
    gateway, replicas, sessions, async_client
):
    engine, asked = replicas[0], {}
    with (
        openai.OpenAI(base_url=gateway.base_url, api_key=BULK_KEY, max_retries=0, timeout=600) as bulk,
        openai.OpenAI(
            base_url=gateway.base_url, api_key=INTERACTIVE_KEY, max_retries=0, timeout=600
        ) as interactive,
    ):
        at_home = {
            sdk.api_key: await asyncio.to_thread(session_at, gateway, sdk, engine.name)
            for sdk in (bulk, interactive)
        }
    streams = await occupy(async_client, sessions[0], 4)  # all that run at once
    try:
        for count, key in enumerate((BULK_KEY, INTERACTIVE_KEY), 1):
            sdk = async_client.with_options(api_key=key)
            asked[key] = asyncio.ensure_future(first_word(sdk, at_home[key]))
            await asyncio.to_thread(until, lambda n=count: engine.metric("num_requests_waiting") == n)
        await streams.pop().close()  # one place is free
        await asyncio.wait_for(asyncio.shield(asked[INTERACTIVE_KEY]), 120)
        assert not asked[BULK_KEY].done()
        assert engine.metric("num_requests_waiting") == 1
        streams.append(asked[INTERACTIVE_KEY].result())
        await streams.pop().close()
        streams.append(await asyncio.wait_for(asyncio.shield(asked[BULK_KEY]), 120))
    finally:
        for call in asked.values():
            call.cancel()
        await asyncio.gather(*asked.values(), return_exceptions=True)
        for stream in streams:
            await stream.close()


async def first_word(sdk, session):
    """A stream that has begun."""
    stream = await ask(sdk, "go on", session, **WANTED)
    await anext(stream)
    return stream
