"""Jobs that an external provider runs: its rates keep a share for others, its 429 is heeded, its async price is charged.

And requests that spill to it: their receivers hear how they ended. The provider is scripted; it cannot be looked into.
"""

import asyncio
import json
from dataclasses import replace

import pytest

from tests.e2e.conftest import UNWATCHED, UPSTREAM_KEY
from tests.e2e.raw import CHAT, ask, called
from tests.support.catalogue import answer_for
from tests.support.gateway_process import Gateway
from tests.support.hook_receiver import HookReceiver
from tests.support.scripted_answer import Answer, Gate
from tests.support.upstream_thread import UpstreamThread

pytestmark = pytest.mark.e2e

PRICE = {"input": 2, "output": 8}
PLAIN = answer_for("chat", {"model": "plain"})
WITHIN_S = 90.0
PROVIDERS = ("calm", "rated", "busy", "single")


@pytest.fixture(scope="module")
def thread():
    with UpstreamThread() as running:
        yield running


@pytest.fixture(scope="module")
def accounts(thread):
    return {name: thread.start() for name in PROVIDERS}


@pytest.fixture(scope="module")
def gateway(accounts, tmp_path_factory):
    def provider(name, **more):
        url = f"{accounts[name].url}/v1"
        return {"type": "openai", "api_key": UPSTREAM_KEY, "base_url": url, "health": UNWATCHED, **more}

    config = {
        "providers": {
            "calm": provider("calm"),
            "rated": provider("rated"),
            "busy": provider("busy"),
            "single": provider("single", placement={"max_in_flight": 1}),
        },
        "models": {
            "calm": {
                "targets": [{"provider": "calm", "model": "plain"}],
                "price": PRICE,
                "async_price_factor": 0.5,
            },
            "rated": {"targets": [{"provider": "rated", "model": "plain"}], "price": PRICE},
            "busy": {"targets": [{"provider": "busy", "model": "plain"}], "price": PRICE},
            "single": {"targets": [{"provider": "single", "model": "plain"}], "price": PRICE},
        },
        "overload": {"default": {"wait_s": 0.1}},
        "queue": {"enabled": True, "reserve": 0.2, "webhooks": {"networks": ["127.0.0.0/8"]}},
    }
    with Gateway(tmp_path_factory.mktemp("gateway"), workers=1, **config) as running:
        yield running
    assert "Traceback" not in running.log(), running.log()[-8000:]


@pytest.fixture(autouse=True)
def _nothing_scripted(accounts):
    for upstream in accounts.values():
        upstream.clear()


async def submitted(gateway, model):
    answer = await ask(gateway, "/v1/jobs", {"endpoint": CHAT, "body": called(CHAT, model)})
    assert answer.status == 202, answer.body
    return json.loads(answer.body)["id"]


async def ended(gateway, job_id):
    async with asyncio.timeout(WITHIN_S):
        while True:
            found = json.loads((await ask(gateway, f"/v1/jobs/{job_id}?wait=5", b"", "GET")).body)
            if found["status"] not in ("queued", "running", "cancelling"):
                return found


async def until(is_so):
    async with asyncio.timeout(WITHIN_S):
        while not is_so():
            await asyncio.sleep(0.02)


async def test_a_job_at_a_provider_costs_the_async_share_of_what_a_request_does(gateway):
    found = await ended(gateway, await submitted(gateway, "calm"))
    assert (found["status"], found["status_code"]) == ("succeeded", 200)
    direct = await ask(gateway, CHAT, called(CHAT, "calm"))
    whole = gateway.row(direct.headers["x-request-id"], WITHIN_S)
    half = gateway.row(found["id"], WITHIN_S)
    assert whole["cost_nanousd"] == 2 * half["cost_nanousd"] > 0
    assert half["price_source"] == f"{whole['price_source']} x 0.5"
    assert found["cost_usd"] == half["cost_nanousd"] / 1e9


async def test_what_a_provider_has_left_of_its_rate_is_left_to_others(gateway, accounts):
    """A fifth is kept; half of that is left, and the rate is whole again in twenty seconds."""
    rated = accounts["rated"]
    told = (
        ("x-ratelimit-limit-requests", "100"),
        ("x-ratelimit-remaining-requests", "10"),
        ("x-ratelimit-reset-requests", "18s"),
    )
    rated.script("chat", replace(PLAIN, headers=(*PLAIN.headers, *told)), PLAIN)
    first = await ended(gateway, await submitted(gateway, "rated"))
    assert first["status"] == "succeeded"
    answered_at = rated.journal[0].ended_at or rated.journal[0].received_at
    waiting = [await submitted(gateway, "rated") for _ in range(2)]
    direct = await ask(gateway, CHAT, called(CHAT, "rated"))
    assert direct.status == 200  # the rest is for those who wait for an answer
    assert (await ended(gateway, waiting[0]))["status"] == "succeeded"
    assert (await ended(gateway, waiting[1]))["status"] == "succeeded"
    jobs = [record for record in rated.journal if (record.header("x-request-id") or "").startswith("job_")]
    assert len(jobs) == 3
    # Rates come back evenly: a tenth of a hundred in 18 * 10 / 90 s.
    assert min(record.received_at for record in jobs[1:]) - answered_at >= 1.9


async def test_a_429_sends_nothing_more_for_as_long_as_it_asks_and_is_no_attempt(gateway, accounts):
    busy = accounts["busy"]
    refusal = Answer.of_error(429, retry_after="3", retry_after_ms="3000")
    busy.script("chat", refusal, PLAIN)
    first = await submitted(gateway, "busy")
    await until(lambda: busy.journal and busy.journal[0].ended == "complete")
    refused_at = busy.journal[0].ended_at
    others = [await submitted(gateway, "busy") for _ in range(3)]
    found = [await ended(gateway, job_id) for job_id in (first, *others)]
    assert [each["status"] for each in found] == ["succeeded"] * 4
    assert found[0]["attempts"] == 0
    assert len(busy.journal) == 5
    assert min(record.received_at for record in busy.journal[1:]) - refused_at >= 2.9
    rows = [gateway.row(each["id"], WITHIN_S) for each in found]
    assert len({row["cost_nanousd"] for row in rows}) == 1


async def test_a_request_that_spills_tells_the_receiver_it_names(gateway, accounts, thread):
    single = accounts["single"]
    gate = thread.gate()
    single.script("chat", replace(PLAIN, before_head=(Gate(gate),)), PLAIN)
    first = asyncio.create_task(ask(gateway, CHAT, called(CHAT, "single")))
    try:
        await until(lambda: single.journal)
        with HookReceiver() as receiver:
            queue = {"x_headgate_on_full": "queue"}
            wrong = await ask(
                gateway, CHAT, called(CHAT, "single"), x_headgate_webhook="http://10.0.0.1/h", **queue
            )
            assert (wrong.status, json.loads(wrong.body)["error"]["code"]) == (400, "invalid_webhook")
            spilled = await ask(
                gateway, CHAT, called(CHAT, "single"), x_headgate_webhook=receiver.url, **queue
            )
            assert spilled.status == 202
            job_id = json.loads(spilled.body)["id"]
            gate.set()
            assert (await first).status == 200
            hook = await asyncio.to_thread(receiver.until, lambda hooks: hooks[:1])
            event = json.loads(hook[0].body)
            assert (event["type"], event["data"]) == ("job.succeeded", {"id": job_id})
        assert all(record.header("x-headgate-webhook") is None for record in single.journal)
        refused = gateway.row(wrong.headers["x-request-id"], WITHIN_S)
        assert (refused["status"], refused["cost_nanousd"]) == (400, 0)
    finally:
        gate.set()
        await first
