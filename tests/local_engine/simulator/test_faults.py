"""Failures on demand do what their names say."""

import asyncio
import json

import aiohttp
import openai
import pytest

from tests.support.simulator_process import SimulatorProcess

USER = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("status=429", openai.RateLimitError),
        ("status=503", openai.InternalServerError),
        ("reset", openai.APIConnectionError),
        ("reset_after=1", openai.APIConnectionError),
        ("error_event_after=1", openai.APIError),
    ],
)
async def test_faults_do_what_their_name_says(client, fault, kind, stream):
    async def consume():
        answer = await client.chat.completions.create(
            model="demo", messages=USER, stream=stream, extra_headers={"x-sim-fault": fault}
        )
        if stream:
            async for _ in answer:
                pass

    # A stream that is reset shows the error of the transport below the SDK.
    with pytest.raises(Exception) as failure:
        await consume()
    if not (stream and fault == "reset_after=1"):
        assert isinstance(failure.value, kind)


async def test_queued_faults_meet_the_next_requests_only(simulator, client):
    simulator.fault("status=500", 2)
    for _ in range(2):
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="demo", messages=USER)
    await client.chat.completions.create(model="demo", messages=USER)
    simulator.fault(None)


@pytest.mark.parametrize(
    ("fault", "stream", "seen"),
    [
        ("hang", True, b""),
        ("hang", False, b""),
        ("hang_after=3", True, b"This"),
        ("hang_after=1", False, b"chat.completion"),
    ],
)
async def test_a_hanging_answer_stops_where_it_should_and_ends_with_its_client(
    simulator, fault, stream, seen
):
    reader, writer = await asyncio.open_connection("127.0.0.1", simulator.port)
    body = json.dumps({"messages": USER, "stream": stream}).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-sim-fault: %b\r\n" % fault.encode())
    writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
    if seen:
        await reader.readuntil(seen)
    with pytest.raises(TimeoutError):
        # Nothing that would end the answer comes, however long one waits.
        await asyncio.wait_for(reader.readuntil(b"[DONE]" if stream else b"usage"), 0.3)
    writer.close()
    while json.loads(await asyncio.to_thread(simulator.get, "/load"))["server_load"]:
        await asyncio.sleep(0.01)


async def test_a_slow_answer_comes_whole(client):
    stream = await client.chat.completions.create(
        model="demo", messages=USER, stream=True, max_tokens=3, extra_headers={"x-sim-fault": "slow=20"}
    )
    assert "".join([chunk.choices[0].delta.content async for chunk in stream]) == "This is the"


@pytest.mark.parametrize("fault", ["", "hang=3", "status=200", "explode"])
async def test_an_unknown_fault_is_refused(http, fault):
    async with http.post(CHAT, json={"messages": USER}, headers={"x-sim-fault": fault}) as answer:
        assert answer.status == 400


async def test_faults_are_ignored_unless_allowed():
    with SimulatorProcess() as simulator:
        async with aiohttp.ClientSession(simulator.url) as http:
            headers = {"x-sim-fault": "status=500"}
            assert (await http.post(CHAT, json={"messages": USER}, headers=headers)).status == 200
            assert (await http.post("/sim/fault", json={"fault": None})).status == 404


async def test_an_engines_condition_slows_it_hides_its_metrics_and_empties_its_cache(simulator, http):
    async def condition(**fields):
        async with http.post("/sim/condition", json=fields) as answer:
            return answer.status, await answer.json()

    async def ask():
        body = {"messages": [{"role": "user", "content": "the same long words " * 40}], "max_tokens": 1}
        async with http.post(CHAT, json=body) as answer:
            return (await answer.json())["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert await ask() == 0
    assert await ask() > 0
    assert (await condition(forget=True))[0] == 200
    assert await ask() == 0

    before = simulator.metrics()["prompt_tokens_total"]
    await condition(metrics="stale")
    await ask()
    assert simulator.metrics()["prompt_tokens_total"] == before
    await condition(metrics="gone")
    async with http.get("/metrics") as answer:
        assert answer.status == 404
    assert (await condition(slowness=0))[0] == 400
    await condition()
    assert simulator.metrics()["prompt_tokens_total"] > before
