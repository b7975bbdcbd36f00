"""Requests that find no room, and jobs: spilled, held, run, tried again, cancelled, billed once. Over real sockets."""

import asyncio
import itertools
import json
from dataclasses import replace

import pytest

from tests.e2e.raw import CHAT, MESSAGES, ask, called
from tests.e2e.raw import request as raw_request
from tests.support.catalogue import answer_for
from tests.support.gateway_process import Gateway
from tests.support.rawcli import RawClient
from tests.support.scripted_answer import Answer, Cut, Gate
from tests.support.upstream_thread import UpstreamThread

pytestmark = pytest.mark.e2e

OTHER_KEY = "sk-test-other-tenant-00000002"
QUEUE = {"x_headgate_on_full": "queue"}
UNWATCHED = {"failures": 0, "retry_floor": 1000, "probe": "none", "scrape": "none"}
PRICE = {"input": 1, "output": 2}
PLAIN = answer_for("chat", {"model": "plain"})
# Of an answer of its own: who asked, when, how long it took.
OF_ITS_TIME = {
    "x-request-id",
    "request-id",
    "date",
    "x-headgate-overhead-us",
    "x-headgate-job",
    "content-length",
}


@pytest.fixture(scope="module")
def thread():
    with UpstreamThread() as running:
        yield running


@pytest.fixture(scope="module")
def small(thread):
    """One slot."""
    return thread.start()


@pytest.fixture(scope="module")
def roomy(thread):
    return thread.start()


@pytest.fixture(scope="module")
def gateway(small, roomy, tmp_path_factory):
    config = settings(small, roomy, {"attempts": 2, "hold": {"hold_s": 60}})
    with Gateway(tmp_path_factory.mktemp("gateway"), workers=1, **config) as running:
        yield running
        held = {n: v for n, v in running.metrics().items() if n.startswith("headgate_requests_in_flight")}
        assert held
        assert not any(held.values()), held
    assert "Traceback" not in running.log(), running.log()[-8000:]


def settings(small, roomy, queue):
    def pool(upstream, **placement):
        return {
            "type": "vllm",
            "endpoints": [f"{upstream.url}/v1"],
            "placement": placement,
            "health": UNWATCHED,
        }

    target = {"targets": [{"pool": "small"}], "price": PRICE}
    return {
        "pools": {"small": pool(small, max_in_flight=1), "roomy": pool(roomy)},
        "models": {
            "alone": target,
            "held": {**target, "on_full": "hold"},
            "roomy": {"targets": [{"pool": "roomy"}], "price": PRICE},
        },
        "overload": {"default": {"wait_s": 0.1}},
        "keys": [{"name": "other", "key": OTHER_KEY, "team": "others"}],
        "queue": {"enabled": True, **queue},
    }


@pytest.fixture(autouse=True)
def _forget(small, roomy):
    small.clear()
    roomy.clear()


@pytest.fixture
async def occupied(gateway, small, thread):
    """The one slot is taken until the gate opens."""
    async with taken(gateway, small, thread) as gate:
        yield gate


class taken:  # noqa: N801 - reads as a word in a `with`
    """Somebody's request has the slot; it goes when the gate opens, at the latest at the end."""

    def __init__(self, gateway, small, thread):
        self.gateway, self.small, self.gate = gateway, small, thread.gate()

    async def __aenter__(self):
        self.small.script("chat", replace(PLAIN, before_head=(Gate(self.gate),)), PLAIN)
        self.first = asyncio.create_task(ask(self.gateway, CHAT, called(CHAT, "alone")))
        await until(lambda: len(chats(self.small)) == 1)
        return self.gate

    async def __aexit__(self, *_):
        self.gate.set()
        assert (await self.first).status == 200


async def until(is_so, within_s=60.0):
    async with asyncio.timeout(within_s):
        while not is_so():
            await asyncio.sleep(0.02)


def chats(upstream):
    return [record for record in upstream.journal if record.dialect == "chat"]


async def get(gateway, path, method="GET", **headers):
    return await ask(gateway, path, b"", method, **headers)


async def job(gateway, job_id, wait_s=5):
    """As it stands when it has ended."""
    async with asyncio.timeout(120):
        while True:
            found = json.loads((await get(gateway, f"/v1/jobs/{job_id}?wait={wait_s}")).body)
            if found["status"] not in ("queued", "running", "cancelling"):
                return found


async def submitted(gateway, body, **fields):
    answer = await ask(gateway, "/v1/jobs", {"endpoint": CHAT, "body": body, **fields})
    assert answer.status == 202, answer.body
    return json.loads(answer.body)["id"]


def kept(headers):
    return {name: value for name, value in headers.items() if name not in OF_ITS_TIME}


def said(body):
    """Of a chat's answer, what is not made anew for each."""
    return json.loads(body)["choices"]


# Spilling


async def test_who_asked_for_the_queue_gets_202_while_there_is_no_room_and_the_answer_later(
    gateway, occupied, small
):
    answer = await ask(gateway, CHAT, called(CHAT, "alone"), **QUEUE)
    told = json.loads(answer.body)
    assert answer.status == 202
    assert (told["object"], told["status"], told["position"]) == ("job", "queued", 1)
    assert answer.headers["location"] == told["poll_url"] == f"/v1/jobs/{told['id']}"
    assert int(answer.headers["retry-after"]) >= 1
    early = await get(gateway, told["result_url"])
    assert early.status == 202
    occupied.set()
    ended = await job(gateway, told["id"])
    assert (ended["status"], ended["status_code"]) == ("succeeded", 200)
    results = [await get(gateway, told["result_url"]) for _ in range(2)]
    direct = await ask(gateway, CHAT, called(CHAT, "alone"))
    assert [result.status for result in results] == [200, 200]
    assert results[0].body == results[1].body
    assert said(results[0].body) == said(direct.body)
    row = gateway.row(told["id"])
    assert (row["ended"], row["cost_nanousd"]) == (
        "completed",
        gateway.row(direct.headers["x-request-id"])["cost_nanousd"],
    )
    assert row["waited_us"] > 0
    parked = gateway.row(answer.headers["x-request-id"])
    assert (parked["ended"], parked["status"], parked["cost_nanousd"]) == ("parked", 202, 0)
    assert chats(small)[1].header("x-request-id") == f"{told['id']}.1"


@pytest.mark.parametrize("wish", [QUEUE, {"service_tier": "flex"}], ids=["header", "flex"])
async def test_who_asked_for_the_queue_is_answered_in_time_while_there_is_room(gateway, small, wish):
    small.clear()
    fields = wish if "service_tier" in wish else {}
    answer = await ask(gateway, CHAT, called(CHAT, "alone", **fields), **({} if fields else wish))
    assert answer.status == 200
    assert said(answer.body)


async def test_flex_spills(gateway, occupied):
    answer = await ask(gateway, CHAT, called(CHAT, "alone", service_tier="flex"))
    assert answer.status == 202
    occupied.set()
    assert (await job(gateway, json.loads(answer.body)["id"]))["status"] == "succeeded"


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_who_did_not_ask_for_it_never_gets_202(gateway, occupied, path):
    answer = await ask(gateway, path, called(path, "alone"))
    assert answer.status in (429, 503)
    assert "retry-after" in answer.headers


async def test_what_cannot_be_run_later_is_refused_at_once(gateway, occupied):
    refused = [
        await ask(gateway, "/v1/jobs", {"endpoint": "/v1/files", "body": {}}),
        await ask(gateway, "/v1/jobs", {"endpoint": CHAT, "body": called(CHAT, "nosuch")}),
        await ask(gateway, "/v1/jobs", {"endpoint": CHAT, "body": {"messages": []}}),
        await ask(gateway, "/v1/jobs", {"endpoint": CHAT, "body": [], "class": "flex"}),
        await ask(gateway, "/v1/jobs", {"endpoint": CHAT, "body": called(CHAT, "alone"), "class": "fast"}),
        await ask(gateway, "/v1/jobs", {"endpoint": CHAT, "body": called(CHAT, "alone"), "expires_in_s": 1}),
        await ask(gateway, "/v1/jobs", {"endpoint": CHAT, "body": called(CHAT, "alone"), "wait": 1}),
        await get(gateway, "/v1/jobs?status=fast"),
        await get(gateway, "/v1/jobs?limit=0"),
    ]
    assert [answer.status for answer in refused] == [400, 404, 400, 400, 400, 400, 400, 400, 400]
    for answer in refused:
        assert set(json.loads(answer.body)["error"]) >= {"message", "type", "param", "code"}


async def test_the_same_idempotency_key_gives_the_same_job(gateway, roomy):
    body = {"endpoint": CHAT, "body": called(CHAT, "roomy")}
    answers = [await ask(gateway, "/v1/jobs", body, idempotency_key="job-1") for _ in range(2)]
    ids = {json.loads(answer.body)["id"] for answer in answers}
    assert len(ids) == 1
    other = await ask(gateway, "/v1/jobs", body | {"body": called(CHAT, "held")}, idempotency_key="job-1")
    assert other.status == 422


# Holding


async def test_a_held_request_is_answered_as_if_it_had_never_waited(gateway, occupied, spilled):
    waiting = asyncio.create_task(ask(gateway, CHAT, called(CHAT, "held")))
    await spilled.until("held")
    assert not waiting.done()
    occupied.set()
    answer = await waiting
    direct = await ask(gateway, CHAT, called(CHAT, "held"))
    assert answer.status == 200
    assert said(answer.body) == said(direct.body)
    assert kept(answer.headers) == kept(direct.headers)
    assert gateway.row(answer.headers["x-headgate-job"])["cost_nanousd"] > 0
    assert gateway.row(answer.headers["x-request-id"])["cost_nanousd"] == 0


async def test_a_held_stream_is_the_stream_it_would_have_been(gateway, occupied, spilled):
    body = called(CHAT, "held", stream=True)
    waiting = asyncio.create_task(ask(gateway, CHAT, body))
    await spilled.until("held")
    occupied.set()
    answer = await waiting
    direct = await ask(gateway, CHAT, body)
    assert answer.status == 200
    assert answer.body == direct.body
    assert kept(answer.headers) == kept(direct.headers)


async def test_what_a_held_request_did_wrong_it_is_told_with_its_status(gateway, occupied, small, spilled):
    small.script("chat", Answer.of_error(400), PLAIN)
    waiting = asyncio.create_task(ask(gateway, CHAT, called(CHAT, "held")))
    await spilled.until("held")
    occupied.set()
    answer = await waiting
    assert answer.status == 400
    assert json.loads(answer.body)["error"]["message"]


async def test_a_client_that_left_takes_up_its_job_when_it_comes_back(gateway, occupied, small, spilled):
    client = await RawClient.connect(gateway.port)
    await client.send(raw_request(CHAT, called(CHAT, "held", seed=1)))
    await spilled.until("held")
    client.close()
    await spilled.until("left")
    occupied.set()
    answer = await ask(gateway, CHAT, called(CHAT, "held", seed=1))
    assert answer.status == 200
    assert answer.headers["x-headgate-job"]
    assert len(chats(small)) == 2, "the first, and the job"


async def test_what_was_answered_is_not_answered_again(gateway, occupied, small, spilled):
    waiting = asyncio.create_task(ask(gateway, CHAT, called(CHAT, "held", seed=2)))
    await spilled.until("held")
    occupied.set()
    first = await waiting
    second = await ask(gateway, CHAT, called(CHAT, "held", seed=2))
    assert "x-headgate-job" in first.headers
    assert "x-headgate-job" not in second.headers
    assert len(chats(small)) == 3


async def test_two_who_ask_the_same_at_once_get_an_answer_each(gateway, occupied, small, spilled):
    both = [asyncio.create_task(ask(gateway, CHAT, called(CHAT, "held", seed=3))) for _ in range(2)]
    await spilled.until("held", 2)
    occupied.set()
    answers = [await each for each in both]
    assert [answer.status for answer in answers] == [200, 200]
    assert len({answer.headers["x-headgate-job"] for answer in answers}) == 2
    assert len(chats(small)) == 3


# Running


async def test_a_request_that_is_wrong_fails_once_and_its_answer_is_kept(gateway, roomy):
    roomy.script("chat", Answer.of_error(400))
    job_id = await submitted(gateway, called(CHAT, "roomy"))
    ended = await job(gateway, job_id)
    assert (ended["status"], ended["status_code"], ended["attempts"]) == ("failed", 400, 0)
    assert ended["error"]["message"]
    result = await get(gateway, f"/v1/jobs/{job_id}/result")
    assert (result.status, len(chats(roomy))) == (400, 1)
    assert gateway.row(job_id)["cost_nanousd"] == 0


async def test_a_broken_engine_is_tried_again_and_what_was_lost_is_waste(gateway, roomy):
    roomy.script("chat", Answer.of_error(500), PLAIN)
    job_id = await submitted(gateway, called(CHAT, "roomy"))
    ended = await job(gateway, job_id)
    assert (ended["status"], ended["attempts"]) == ("succeeded", 1)
    assert [record.header("x-request-id") for record in chats(roomy)] == [f"{job_id}.1", f"{job_id}.2"]
    row = gateway.row(job_id)
    assert row["attempts"] == 2
    assert [each[1] for each in json.loads(row["failed_attempts"])] == ["500"]
    assert row["cost_nanousd"] > 0


async def test_a_stream_that_broke_off_is_begun_again_and_costs_its_caller_nothing(gateway, roomy, thread):
    gate, asked = thread.gate(), called(CHAT, "roomy", stream=True, stream_options={"include_usage": True})
    answer = answer_for("chat", asked)
    roomy.script("chat", replace(answer, parts=(*answer.parts[:3], Gate(gate), Cut())), answer)
    job_id = await submitted(gateway, called(CHAT, "roomy", stream=True))
    reader = await RawClient.connect(gateway.port)
    await reader.send(raw_request(f"/v1/jobs/{job_id}/stream", method="GET"))
    said = b""
    while b"id: 3\n" not in said:
        said += await reader.receive()
    gate.set()
    while b"0\r\n\r\n" not in said:
        said += await reader.receive()
    reader.close()
    assert b": begun again\n\n" in said
    assert b"upstream_incomplete" not in said
    assert (await job(gateway, job_id))["status"] == "succeeded"
    direct = await ask(gateway, CHAT, called(CHAT, "roomy", stream=True))
    assert (await get(gateway, f"/v1/jobs/{job_id}/result")).body == direct.body
    rows = [gateway.row(job_id), gateway.row(direct.headers["x-request-id"])]
    assert rows[0]["cost_nanousd"] == rows[1]["cost_nanousd"]
    assert rows[0]["wasted_nanousd"] > 0


async def test_a_job_out_of_attempts_is_dead_and_free(gateway, roomy):
    roomy.script("chat", Answer.of_error(500), Answer.of_error(500))
    job_id = await submitted(gateway, called(CHAT, "roomy"))
    ended = await job(gateway, job_id)
    assert (ended["status"], ended["attempts"]) == ("dead", 2)
    assert gateway.row(job_id)["cost_nanousd"] == 0


async def test_a_lack_of_room_is_no_attempt_and_its_retry_after_is_obeyed(gateway, roomy):
    roomy.clear()
    too_many = Answer.of_error(429, retry_after="1", retry_after_ms="1000")
    roomy.script("chat", too_many, too_many, too_many, PLAIN)
    job_id = await submitted(gateway, called(CHAT, "roomy"))
    ended = await job(gateway, job_id)
    assert (ended["status"], ended["attempts"]) == ("succeeded", 0)
    times = [record.received_at for record in chats(roomy)]
    assert len(times) == 4
    assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(times))


async def test_a_stream_can_be_read_again_from_any_event(gateway, roomy):
    job_id = await submitted(gateway, called(CHAT, "roomy", stream=True))
    await job(gateway, job_id)
    whole = await get(gateway, f"/v1/jobs/{job_id}/stream")
    result = await get(gateway, f"/v1/jobs/{job_id}/result")
    lines = whole.body.split(b"\n\n")[:-1]
    assert b"\n\n".join(line.split(b"\n", 1)[1] for line in lines) + b"\n\n" == result.body
    rest = await get(gateway, f"/v1/jobs/{job_id}/stream", last_event_id="2")
    assert rest.body == b"\n\n".join(lines[2:]) + b"\n\n"
    gateway.row(job_id)
    assert len(gateway.rows()) == len({row["request_id"] for row in gateway.rows()})


async def test_a_job_tells_what_happens_to_it(gateway, roomy):
    job_id = await submitted(gateway, called(CHAT, "roomy"), reference="mine")
    told = await get(gateway, f"/v1/jobs/{job_id}", accept="text/event-stream")
    events = [json.loads(e.split(b"data: ")[1]) for e in told.body.split(b"\n\n")[:-1]]
    assert events[-1]["status"] == "succeeded"
    assert {event["reference"] for event in events} == {"mine"}
    listed = json.loads((await get(gateway, "/v1/jobs?limit=1&status=succeeded")).body)
    assert listed["data"][0]["id"] == job_id
    assert listed["has_more"]
    page = json.loads((await get(gateway, f"/v1/jobs?limit=1&after={listed['next']}")).body)
    assert page["data"][0]["id"] != job_id


async def test_nobody_finds_a_job_of_another(gateway, roomy):
    job_id = await submitted(gateway, called(CHAT, "roomy"))
    await job(gateway, job_id)
    for path, method in (
        ("", "GET"),
        ("/result", "GET"),
        ("/stream", "GET"),
        ("/cancel", "POST"),
        ("", "DELETE"),
    ):
        theirs = await get(gateway, f"/v1/jobs/{job_id}{path}", method, key=OTHER_KEY)
        nobodys = await get(gateway, f"/v1/jobs/job_{'0' * 32}{path}", method, key=OTHER_KEY)
        assert theirs.status == nobodys.status == 404
    assert json.loads((await get(gateway, "/v1/jobs", key=OTHER_KEY)).body)["data"] == []


# Cancelling


async def test_a_job_that_waits_is_cancelled_free_of_charge(gateway, occupied, small):
    job_id = await submitted(gateway, called(CHAT, "alone"))
    answer = await get(gateway, f"/v1/jobs/{job_id}", "DELETE")
    assert json.loads(answer.body)["status"] == "cancelled"
    result = await get(gateway, f"/v1/jobs/{job_id}/result")
    assert result.status == 409
    occupied.set()
    after = await submitted(gateway, called(CHAT, "alone"))
    await job(gateway, after)
    assert len(chats(small)) == 2, "the one that had the slot, and the last job"
    gateway.row(after)
    assert not [row for row in gateway.rows() if row["request_id"] == job_id]


async def test_a_job_that_runs_is_cut_off_at_once_and_pays_for_what_it_used(gateway, roomy, thread):
    answer = answer_for("chat", called(CHAT, "roomy"))
    roomy.script("chat", replace(answer, before_head=(Gate(thread.gate()),)))
    job_id = await submitted(gateway, called(CHAT, "roomy"))
    record = await asyncio.to_thread(roomy.wait_for, 1)
    cancelled = await get(gateway, f"/v1/jobs/{job_id}/cancel", "POST")
    assert json.loads(cancelled.body)["status"] in ("cancelling", "cancelled")
    assert await asyncio.to_thread(roomy.wait_end, record) == "peer gone"
    ended = await job(gateway, job_id)
    assert (ended["status"], ended["error"]["message"]) == ("cancelled", "it was cancelled")
    row = gateway.row(job_id)
    assert (row["is_estimated"], row["cost_nanousd"] > 0) == (1, True)


async def test_a_job_that_has_ended_stays_as_it_is_and_is_deleted_when_asked(gateway, roomy):
    job_id = await submitted(gateway, called(CHAT, "roomy"))
    await job(gateway, job_id)
    cancelled = await get(gateway, f"/v1/jobs/{job_id}/cancel", "POST")
    assert json.loads(cancelled.body)["status"] == "succeeded"
    assert (await get(gateway, f"/v1/jobs/{job_id}/result")).status == 200
    for wait in ("x", "-1", "nan"):  # wrong however soon the answer is there
        assert (await get(gateway, f"/v1/jobs/{job_id}?wait={wait}")).status == 400
    await get(gateway, f"/v1/jobs/{job_id}", "DELETE")
    gone = await get(gateway, f"/v1/jobs/{job_id}/result")
    assert gone.status == 410
    assert json.loads(gone.body)["job"]["status"] == "succeeded"


class Spilled:
    """What became of requests that met the queue, since this was made."""

    def __init__(self, gateway):
        self._gateway = gateway
        self._before = self._counts()

    async def until(self, outcome, count=1):
        async with asyncio.timeout(60):
            while (await asyncio.to_thread(self._counts))[outcome] - self._before[outcome] < count:
                await asyncio.sleep(0.05)

    def _counts(self):
        metrics = self._gateway.metrics()
        outcomes = ("held", "left")
        return {each: metrics[f'headgate_queue_spilled_total{{outcome="{each}"}}'] for each in outcomes}


@pytest.fixture
def spilled(gateway):
    return Spilled(gateway)
