"""The queue's webhooks from the transaction that ends a job to the receiver: at least once, under one id, in its API's words."""

import asyncio
import json

import pytest

from gateway.overflow.endpoints import Endpoints, QueueWebhooksConfig
from gateway.overflow.job import Outcome
from gateway.overflow.outbox import QueueOutbox
from gateway.overflow.webhooks import QueueWebhooks, UnknownEndpointError, UnknownMessageError
from gateway.stores.endpoint_table import SqliteEndpoints
from gateway.webhook_delivery import RETRIES_S, WebhookDelivery
from tests.gateway.test_webhooks import SECRET, receiving
from tests.support.queue_jobs import LANE, NO_LIMITS, a_job, a_parent, an_answer
from tests.support.queue_stores import STORES, opened

PEPPER = b"p" * 32
LOCAL = QueueWebhooksConfig(networks=["127.0.0.0/8"])


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("queue")) as servers:
        yield servers


class Desk:
    """A queue, a receiver, and whoever delivers between them."""

    def __init__(self, queue, receiver, sender, storage) -> None:
        self.store, self.other, self.clock = queue.store, queue.other, queue.clock
        self.receiver, self.sender = receiver, sender
        self.endpoints = Endpoints(lambda: LOCAL, SqliteEndpoints(storage), PEPPER)
        self.webhooks = QueueWebhooks(queue.store, self.endpoints, lambda: LOCAL, "a")

    async def deliver(self, after_s: float = 0.0, owner: str = "a") -> int:
        """How many were taken."""
        self.clock.forward(after_s)
        store = self.store if owner == "a" else self.other
        return await WebhookDelivery(QueueOutbox(store, self.endpoints, owner), "webhook").deliver_due(
            self.sender
        )

    async def end(
        self, job_id: str, webhook: str, state: str = "succeeded", body: bytes = b"{}", **others
    ) -> None:
        await self.store.submit(a_job(job_id, webhook=webhook, **others), NO_LIMITS)
        if state == "cancelled":
            await self.store.cancel("t1", job_id)
            return
        claimed = await self.store.claim(LANE, "worker")
        outcome = an_answer(body) if state == "succeeded" else Outcome(state=state, error="it was refused")
        await self.store.finish(claimed.lease, outcome)

    @property
    def events(self) -> list[dict]:
        return [json.loads(body) for _, body in self.receiver.received]

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.receiver.received]


@pytest.fixture(params=STORES)
async def desk(request, tmp_path, servers):
    queue = await servers.queue(request.param, tmp_path)
    async with receiving() as (receiver, sender):
        yield Desk(queue, receiver, sender, tmp_path)
    await queue.close()


async def test_a_job_that_ended_is_told_once_and_signed(desk):
    await desk.end("job_a", desk.receiver.url, reference="ref-1")
    assert [await desk.deliver(), await desk.deliver(), await desk.deliver(10**5)] == [1, 0, 0]
    ((headers, _),) = desk.receiver.received
    assert headers["webhook-id"].startswith("msg_")
    (event,) = desk.events
    assert event["id"] == "evt_" + headers["webhook-id"].removeprefix("msg_")
    assert (event["object"], event["type"]) == ("event", "job.succeeded")
    assert event["data"] == {"id": "job_a", "reference": "ref-1"}
    (message,) = await desk.webhooks.messages("job_a", 10)
    assert (message["state"], message["attempts"], message["told"]) == ("delivered", 1, "succeeded")
    assert message["to"] == f"127.0.0.1:{desk.receiver.port}", "a path may be a secret of its own"


@pytest.mark.parametrize(
    ("door", "state", "body", "kind"),
    [
        ("job", "failed", b"", "job.failed"),
        ("job", "cancelled", b"", "job.cancelled"),
        ("response", "succeeded", b'{"status":"completed"}', "response.completed"),
        ("response", "succeeded", b'{"status":"incomplete"}', "response.incomplete"),
        ("response", "succeeded", b"no json", "response.completed"),
        ("response", "failed", b"", "response.failed"),
        ("response", "cancelled", b"", "response.cancelled"),
        ("workers_ai", "succeeded", b"{}", "cf.workersAi.model.batch.succeeded"),
        ("workers_ai", "failed", b"", "cf.workersAi.model.batch.failed"),
    ],
)
async def test_each_door_tells_in_the_words_of_its_api(desk, door, state, body, kind):
    await desk.end("job_a", desk.receiver.url, state, body, door=door)
    assert await desk.deliver() == 1
    (event,) = desk.events
    assert event["type"] == kind
    assert (event["payload"]["requestId"] if door == "workers_ai" else event["data"]["id"]) == "job_a"


async def test_workers_ai_tells_as_cloudflares_event_subscriptions_do(desk):
    await desk.end("job_a", desk.receiver.url, "failed", door="workers_ai")
    await desk.deliver()
    (event,) = desk.events
    assert set(event) == {"type", "source", "payload", "metadata"}
    assert event["source"] == {"type": "workersAi.model", "modelName": "m"}
    assert event["payload"] == {
        "requestId": "job_a",
        "message": "it was refused",
        "internalCode": 5004,
        "httpCode": 500,
    }
    assert (event["metadata"]["accountId"], event["metadata"]["eventSchemaVersion"]) == ("t1", 1)


async def test_what_is_held_for_a_client_that_waits_is_told_to_nobody(desk):
    await desk.end("job_a", desk.receiver.url, door="held")
    assert await desk.deliver() == 1
    assert desk.receiver.received == []


async def test_a_batch_is_told_as_a_whole(desk):
    parent = a_parent("batch_a", webhook=desk.receiver.url, is_finalized=False)
    await desk.store.submit_all(parent, [a_job(f"job_{n}") for n in range(2)], NO_LIMITS)
    for _ in range(2):
        assert await desk.deliver() == 0
        await desk.store.finish((await desk.store.claim(LANE, "w")).lease, an_answer())
    assert await desk.deliver() == 1
    assert [(event["type"], event["data"]) for event in desk.events] == [
        ("batch.completed", {"id": "batch_a"})
    ]


async def test_a_receiver_that_fails_is_told_again_by_the_specifications_table(desk):
    desk.receiver.answers = [500]
    await desk.end("job_a", desk.receiver.url)
    waits = [0.0, *RETRIES_S]
    for wait_s in waits:
        assert await desk.deliver(wait_s * 0.99 if wait_s else 0.0) == (0 if wait_s else 1)
        if wait_s:
            assert await desk.deliver(wait_s * 0.12) == 1
    assert await desk.deliver(10**6) == 0
    assert len(set(desk.ids)) == 1
    assert len(desk.ids) == len(waits) == 10
    assert sum(waits) == 75 * 3600 + 35 * 60 + 5
    (message,) = await desk.webhooks.messages("job_a", 10)
    assert (message["state"], message["attempts"], message["error"]) == ("given up", 10, "status 500")


async def test_what_was_given_up_is_told_again_on_request_under_its_id(desk):
    desk.receiver.answers = [410, 200]
    await desk.end("job_a", desk.receiver.url)
    assert [await desk.deliver(), await desk.deliver(10**6)] == [1, 0]
    (message,) = await desk.webhooks.messages("", 10)
    assert await desk.webhooks.replay(message["id"]) == {"id": message["id"], "state": "waiting"}
    assert await desk.deliver() == 1
    assert desk.ids == [message["id"]] * 2
    with pytest.raises(UnknownMessageError):
        await desk.webhooks.replay("msg_unknown")


async def test_who_dies_on_the_way_is_replaced_and_nobody_else_delivers_meanwhile(desk):
    await desk.end("job_a", desk.receiver.url)
    (row,) = await desk.store.take_outbox("dead")
    assert await desk.deliver(50.0, owner="b") == 0
    assert await desk.deliver(11.0, owner="b") == 1
    await desk.store.outbox_failed(row, 0.0, "from beyond")
    assert await desk.deliver(10**5) == 0
    assert desk.ids == [row.id]


async def test_each_receiver_of_a_job_is_told_for_itself(desk):
    made = [await desk.endpoints.create("t1", desk.receiver.url, []) for _ in range(2)]
    async with receiving() as (broken, _):
        broken.answers = [500]
        names = await desk.endpoints.names("t1", "job", broken.url)
        assert names.split() == [broken.url, *(each.id for each in made)]
        await desk.end("job_a", names)
        assert await desk.deliver() == 3
        assert await desk.deliver(6.0) == 1
        assert len(broken.received) == 2
    assert len(set(desk.ids)) == 2


async def test_410_ends_what_an_endpoint_is_told(desk):
    made = await desk.endpoints.create("t1", desk.receiver.url, [])
    await desk.end("job_a", made.id)
    await desk.end("job_b", made.id)
    desk.receiver.answers = [410]
    assert await desk.deliver() == 2
    assert await desk.endpoints.names("t1", "job") == ""
    await desk.end("job_c", made.id)
    told = len(desk.ids)
    assert await desk.deliver(10**5) == 1
    assert len(desk.ids) == told
    (listed,) = await desk.webhooks.listed("t1")
    assert listed["state"] == "disabled: it answered 410"


async def test_an_endpoint_that_does_not_want_an_event_does_not_get_it(desk):
    made = await desk.endpoints.create("t1", desk.receiver.url, ["job.failed"])
    await desk.end("job_a", made.id)
    await desk.end("job_b", made.id, "failed")
    assert await desk.deliver() == 2
    assert [event["type"] for event in desk.events] == ["job.failed"]


async def test_nobody_is_told_of_another_tenants_jobs(desk):
    theirs = await desk.endpoints.create("t2", desk.receiver.url, [])
    await desk.end("job_a", theirs.id)
    assert await desk.deliver() == 1
    assert desk.receiver.received == []


async def test_an_endpoint_is_tried_out_at_once(desk):
    made = await desk.webhooks.create("t1", desk.receiver.url, [])
    assert (await desk.webhooks.test(made["id"]))["is_delivered"]
    (event,) = desk.events
    assert (event["type"], event["data"]) == ("webhook.test", {"id": made["id"]})
    desk.receiver.answers = [404]
    assert (await desk.webhooks.test(made["id"]))["status"] == 404
    for name in ("we_unknown", "t1"):
        with pytest.raises(UnknownEndpointError):
            await desk.webhooks.test(name)


async def test_secrets_are_shown_when_they_are_made_and_listed_nowhere(desk):
    made = await desk.webhooks.create("t1", desk.receiver.url, [])
    assert made["secret"].startswith("whsec_")
    assert (await desk.webhooks.shown(made["id"]))["secret"] == made["secret"]
    assert (await desk.webhooks.rotate(made["id"], 60.0))["secret"] != made["secret"]
    assert (await desk.webhooks.shown("t1"))["secret"] != made["secret"]
    assert "whsec_" not in json.dumps(await desk.webhooks.listed())
    assert SECRET not in repr(LOCAL)


async def test_a_receiver_that_hangs_does_not_keep_others_waiting(desk):
    """Of fifty for it, few are under way at a time; the rest is put off, uncounted."""
    async with receiving() as (slow, _):
        slow.is_hanging = True
        for n in range(50):
            await desk.end(f"job_{n}", slow.url)
        await desk.end("job_z", desk.receiver.url)
        delivery = WebhookDelivery(QueueOutbox(desk.store, desk.endpoints, "a"), "webhook")
        taken = 0
        while not desk.receiver.received:
            taken += await delivery.begin_due(desk.sender)
            await asyncio.sleep(0.01)
        assert taken == 51
        await slow.wait_until(8)
        assert slow.under_way == 8
        waiting = [row for row in await desk.store.list_outbox(most=100) if row.webhook == slow.url]
        assert sum(row.attempts for row in waiting) == 0
        slow.is_hanging = False
        slow.release.set()
        await delivery.deliver_due(desk.sender)
        while any(row.next_time for row in await desk.store.list_outbox(most=100)):
            desk.clock.forward(700)
            await delivery.deliver_due(desk.sender)
    assert len({headers["webhook-id"] for headers, _ in slow.received}) == 50
