"""What clients see of a gateway that shuts down or is full: an answer they can act on, and rows for all of it."""

import asyncio
import json
import signal

import pytest

from tests.e2e.conftest import PRICE, UPSTREAM_KEY
from tests.e2e.raw import CHAT, MESSAGES, called, request
from tests.support import recordings
from tests.support.gateway_process import Gateway
from tests.support.rawcli import RawClient
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e


@pytest.fixture
def own(upstreams, tmp_path):
    """A gateway of the test's own, to shut down."""
    account = {"api_key": UPSTREAM_KEY}
    with Gateway(
        tmp_path,
        server={"drain_timeout_s": 1.0, "limits": {"connections": 6}},
        providers={
            "acme": {"type": "openai", "base_url": f"{upstreams.main.url}/v1", **account},
            "claude": {"type": "anthropic", "base_url": upstreams.main.url, **account},
        },
        prices={"overrides": dict.fromkeys(("acme/*", "claude/*"), PRICE)},
    ) as gateway:
        yield gateway


async def test_open_requests_may_end_and_what_does_not_is_told_why(own, upstream):
    gate = upstream.gate()
    events = recordings.chat_events(tokens=None, model="ends")
    upstream.script("chat", Answer.of_events(events).gate_after(2, gate), model="ends")
    calls = {
        "ends": (CHAT, called(CHAT, "acme/ends", stream=True)),
        "chat": (CHAT, called(CHAT, "acme/hang-after-3", stream=True)),
        "message": (MESSAGES, called(MESSAGES, "claude/hang-after-5", stream=True)),
        "whole": (CHAT, called(CHAT, "acme/hang")),
    }
    clients = {}
    for name, (path, body) in calls.items():
        clients[name] = await RawClient.connect(own.port)
        await clients[name].send(request(path, body))
        await asyncio.to_thread(upstream.wait_for, len(clients))
    own.process.send_signal(signal.SIGTERM)
    reading = {name: asyncio.ensure_future(client.read_answer()) for name, client in clients.items()}
    gate.set()
    answers = {name: await answer for name, answer in reading.items()}
    assert own.stop() == 0

    assert answers["ends"].is_complete
    assert answers["ends"].body == b"".join(events)
    assert not answers["chat"].is_complete
    error = json.loads(answers["chat"].body.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]
    assert (error["code"], error["type"]) == ("gateway_shutting_down", "server_error")
    assert not answers["message"].is_complete
    assert answers["message"].body.split(b"\n\n")[-2].startswith(b'event: error\ndata: {"type":"error"')
    whole = answers["whole"]
    assert (whole.status, json.loads(whole.body)["error"]["code"]) == (503, "gateway_shutting_down")
    assert (whole.headers["retry-after"], whole.headers["x-should-retry"]) == ("1", "true")
    assert whole.headers["connection"] == "close"

    assert [await asyncio.to_thread(upstream.wait_end, record) for record in upstream.journal] == [
        "complete",
        *["peer gone"] * 3,
    ]
    rows = {row["request_id"]: row for row in own.rows()}
    told = {name: rows.pop(answer.headers["x-request-id"]) for name, answer in answers.items()}
    assert not rows
    assert [told[name]["ended"] for name in calls] == ["completed", "drained", "drained", "drained"]
    assert [told[name]["is_estimated"] for name in ("chat", "message", "whole")] == [1, 1, 1]
    for client in clients.values():
        client.close()


async def test_a_full_gateway_says_when_to_come_back_and_serves_those_it_has(own, upstream):
    clients = [await RawClient.connect(own.port) for _ in range(6)]
    for client in clients:
        assert (await client.exchange(request("/livez", method="GET"))).status == 200
    late = await RawClient.connect(own.port)
    await late.send(request(CHAT, called(CHAT, "acme/plain")))
    refused = await late.read_answer()
    error = json.loads(refused.body)["error"]
    assert (refused.status, error["code"], error["type"]) == (503, "too_many_connections", "server_error")
    assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("1", "true")
    assert upstream.journal == []
    answer = await clients[0].exchange(request(CHAT, called(CHAT, "acme/plain")))
    assert answer.status == 200
    for client in (*clients, late):
        client.close()
