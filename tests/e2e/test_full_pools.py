"""What becomes of requests when a pool is full, and of those that must go to one place: over real sockets."""

import asyncio
import json
from dataclasses import replace

import pytest

from tests.e2e.raw import CHAT, MESSAGES, RESPONSES, ask, called
from tests.support.catalogue import answer_for
from tests.support.gateway_process import Gateway
from tests.support.scripted_answer import Answer, Gate
from tests.support.upstream_thread import UpstreamThread

pytestmark = pytest.mark.e2e

OTHER_KEY = "sk-test-other-tenant-00000001"
BULK_KEY = "sk-test-bulk-000000000000001"


@pytest.fixture(scope="module")
def thread():
    with UpstreamThread() as running:
        yield running


@pytest.fixture(scope="module")
def small(thread):
    """One slot."""
    return thread.start()


@pytest.fixture(scope="module")
def spare(thread):
    return thread.start()


@pytest.fixture(scope="module")
def ranked(thread):
    return thread.start()


@pytest.fixture(scope="module")
def gateway(small, spare, ranked, tmp_path_factory):
    limited = {"max_in_flight": 1}
    pools = {
        "small": {"type": "vllm", "endpoints": [f"{small.url}/v1"], "placement": limited},
        "spare": {"type": "vllm", "endpoints": [f"{spare.url}/v1"]},
        "ranks": {
            "type": "vllm",
            "endpoints": [f"{ranked.url}/v1"],
            "data_parallel_ranks": 4,
            "cache_salt": True,
            "priority": "class",
        },
    }
    models = {
        "alone": {"targets": [{"pool": "small"}]},
        "backed": {"targets": [{"pool": "small"}, {"pool": "spare"}]},
        "ranked": {"targets": [{"pool": "ranks"}]},
    }
    overload = {"default": {"wait_s": 20}, "bulk": {"wait_s": 0.1}}
    keys = [
        {"name": "other", "key": OTHER_KEY, "team": "others"},
        {"name": "bulk", "key": BULK_KEY, "team": "bulk", "priority": "bulk"},
    ]
    directory = tmp_path_factory.mktemp("gateway")
    with Gateway(directory, workers=1, pools=pools, models=models, overload=overload, keys=keys) as running:
        yield running
        samples = running.metrics()
        for family in (
            "headgate_requests_in_flight",
            "headgate_uncached_tokens_in_flight",
            "headgate_waiting_requests",
        ):
            held = {name: value for name, value in samples.items() if name.startswith(family)}
            assert held
            assert not any(held.values()), held
    assert "Traceback" not in running.log()


@pytest.fixture
async def occupied(gateway, small, thread):
    """The one slot is taken until the gate opens."""
    small.clear()
    gate = thread.gate()
    answer = answer_for("chat", {"model": "plain"})
    small.script("chat", replace(answer, before_head=(Gate(gate),)), answer)
    first = asyncio.create_task(ask(gateway, CHAT, called(CHAT, "alone")))
    await until(gateway, 'headgate_requests_in_flight{endpoint="small"}', 1)
    yield gate
    gate.set()
    assert (await first).status == 200


def chats(upstream):
    """Without the probes."""
    return [record for record in upstream.journal if record.dialect == "chat"]


def code(answer):
    return json.loads(answer.body)["error"]["code"]


async def test_item_12_a_request_waits_for_room_and_is_served(gateway, occupied):
    waiting = asyncio.create_task(ask(gateway, CHAT, called(CHAT, "alone")))
    await until(gateway, 'headgate_waiting_requests{pool="small"}', 1)
    occupied.set()
    answer = await waiting
    assert answer.status == 200
    row = gateway.row(answer.headers["x-request-id"])
    assert row["waited_us"] > 0
    assert row["overhead_us"] < row["waited_us"] + 500_000


@pytest.mark.parametrize(
    "wish",
    [
        ({"x_headgate_on_full": "reject"}, {}),
        ({}, {"rejectIfBusy": True}),
        ({}, {"options": {"rejectIfBusy": True}}),
    ],
    ids=["header", "top level", "options"],
)
async def test_item_12_who_will_not_wait_is_refused_at_once_and_told_when_to_come_back(
    gateway, occupied, wish
):
    headers, fields = wish
    answer = await ask(gateway, CHAT, called(CHAT, "alone", **fields), **headers)
    assert answer.status == 429
    assert code(answer) == "pool_full"
    assert int(answer.headers["retry-after-ms"]) > 0
    assert answer.headers["x-should-retry"] == "true"


async def test_item_12_who_waited_too_long_is_told_so(gateway, occupied):
    answer = await ask(gateway, CHAT, called(CHAT, "alone"), key=BULK_KEY)
    assert (answer.status, code(answer)) == (503, "wait_timeout")
    assert "retry-after" in answer.headers


async def test_item_12_a_full_model_falls_back_to_its_next_target(gateway, occupied):
    at_once = await ask(gateway, CHAT, called(CHAT, "backed"), x_headgate_on_full="fallback")
    after_waiting = await ask(gateway, CHAT, called(CHAT, "backed"), key=BULK_KEY)
    for answer in (at_once, after_waiting):
        assert (answer.status, answer.headers["x-headgate-target"]) == (200, "spare")
        assert gateway.row(answer.headers["x-request-id"])["place_reason"] == "fallback"
    only_waits = await ask(gateway, CHAT, called(CHAT, "backed"), key=BULK_KEY, x_headgate_on_full="wait")
    assert code(only_waits) == "wait_timeout"


async def test_without_a_queue_nothing_is_queued(gateway, occupied):
    answer = await ask(gateway, CHAT, called(CHAT, "alone"), x_headgate_on_full="queue")
    assert (answer.status, code(answer)) == (429, "no_queue")


async def test_anthropic_clients_are_refused_in_their_own_words(gateway, occupied):
    answer = await ask(gateway, MESSAGES, called(MESSAGES, "alone"), x_headgate_on_full="reject")
    assert json.loads(answer.body)["error"]["type"] == "rate_limit_error"


async def test_nobody_puts_himself_before_others(gateway, occupied):
    """The bulk key asks for a higher class, and still waits no longer than bulk does."""
    answer = await ask(gateway, CHAT, called(CHAT, "alone"), key=BULK_KEY, x_headgate_priority="system")
    assert code(answer) == "wait_timeout"


async def test_item_13_a_client_that_goes_leaves_the_room(gateway, occupied):
    waiting = asyncio.create_task(ask(gateway, CHAT, called(CHAT, "alone")))
    await until(gateway, 'headgate_waiting_requests{pool="small"}', 1)
    waiting.cancel()
    await until(gateway, 'headgate_waiting_requests{pool="small"}', 0)
    assert (await asyncio.to_thread(gateway.metrics))['headgate_waited_requests_total{outcome="left"}'] >= 1


async def until(gateway, name, value):
    async with asyncio.timeout(40):
        while (await asyncio.to_thread(gateway.metrics)).get(name) != value:
            await asyncio.sleep(0.05)


async def test_item_8_every_data_parallel_rank_is_an_endpoint_and_keeps_its_sessions(gateway, ranked):
    async def rank_of(**headers):
        answer = await ask(gateway, CHAT, called(CHAT, "ranked"), x_data_parallel_rank="7", **headers)
        rank = chats(ranked)[-1].header("x-data-parallel-rank")
        assert answer.headers["x-headgate-target"] == f"ranks/{rank}"
        return rank

    for n in range(8):
        assert await rank_of(x_session_id=f"s{n}") == await rank_of(x_session_id=f"s{n}")
    assert {await rank_of(x_headgate_affinity="none") for _ in range(4)} == {"0", "1", "2", "3"}


async def test_item_6_the_gateway_salts_caches_by_tenant_whatever_the_client_says(gateway, ranked):
    ranked.clear()
    for key in ({}, {"key": OTHER_KEY}):
        for fields in ({}, {"cache_salt": "mine"}, {"cache_salt": "mine"}):
            await ask(gateway, CHAT, called(CHAT, "ranked", **fields), **key)
    salts = [record.json["cache_salt"] for record in chats(ranked)]
    assert salts[1] == salts[2]
    assert salts[4] == salts[5]
    assert len(set(salts)) == 4
    assert "mine" not in salts


async def test_engines_are_told_the_class_of_a_request_whatever_the_client_says(gateway, ranked):
    ranked.clear()
    for key in ({}, {"key": BULK_KEY}):
        for fields in ({}, {"priority": -1000}):
            await ask(gateway, CHAT, called(CHAT, "ranked", **fields), x_vllm_priority="-1000", **key)
    assert [record.json.get("priority") for record in chats(ranked)] == [None, 0, 10, 10]
    assert {record.header("x-vllm-priority") for record in chats(ranked)} == {None}
    await ask(gateway, MESSAGES, called(MESSAGES, "ranked"), x_vllm_priority="-1000", key=BULK_KEY)
    anthropic = [record for record in ranked.journal if record.dialect == "messages"]
    assert [record.header("x-vllm-priority") for record in anthropic] == ["10"]


async def test_an_answer_is_continued_where_it_was_made(gateway, ranked):
    ranked.clear()
    plain = json.loads(answer_for("responses", {"model": "plain"}).body)
    for n in range(8):
        names = (f"resp_{n}_first", f"resp_{n}_second", f"resp_{n}_foreign")
        ranked.script("responses", *(Answer.of_json({**plain, "id": name}) for name in names))
        first = await ask(gateway, RESPONSES, called(RESPONSES, "ranked"), x_session_id=f"r{n}")
        home, made = first.headers["x-headgate-target"], json.loads(first.body)["id"]
        body = called(RESPONSES, "ranked", previous_response_id=made, input=f"and then {n}")
        following = await ask(gateway, RESPONSES, body)
        assert following.headers["x-headgate-target"] == home
        row = gateway.row(following.headers["x-request-id"])
        assert row["place_reason"] == "pinned"
        assert row["session_hash"] == gateway.row(first.headers["x-request-id"])["session_hash"]
        # Nobody else's answer is found by its id.
        foreign = await ask(gateway, RESPONSES, body, key=OTHER_KEY)
        assert gateway.row(foreign.headers["x-request-id"])["place_reason"] != "pinned"
