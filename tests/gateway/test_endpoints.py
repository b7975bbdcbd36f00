"""Receivers of the queue's webhooks: who hears of what, signed with which secrets, and what a row of the outbox says."""

import base64
import time

import openai
import pytest

from gateway.overflow.endpoints import ALL_EVENTS, MOST_PER_TENANT, Endpoints, QueueWebhooksConfig
from gateway.stores.endpoint_redis import RedisEndpoints
from gateway.stores.endpoint_table import SqliteEndpoints
from gateway.stores.redis_connection import RedisConnection
from gateway.webhooks import signature
from tests.gateway.test_webhooks import SECRET
from tests.support.redis_server import RedisServer

PEPPER = b"p" * 32
URL = "https://hooks.acme.example/x"


class Clock:
    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def settings() -> QueueWebhooksConfig:
    return QueueWebhooksConfig(
        networks=["10.0.5.0/24"],
        endpoints=[
            {
                "tenant": "acme",
                "url": "https://declared.acme.example/",
                "secrets": [SECRET],
                "events": ["batch.*"],
            },
            {"tenant": "acme", "url": "https://off.acme.example/", "secrets": [""]},
        ],
    )


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["sqlite", "redis"])
def store(request, tmp_path):
    if request.param == "sqlite":
        return SqliteEndpoints(tmp_path)
    server = request.getfixturevalue("redis_server")
    server.command("FLUSHALL")
    return RedisEndpoints(RedisConnection(server.url, "test", timeout_s=10.0))


@pytest.fixture
async def endpoints(settings, store, clock):
    made = Endpoints(lambda: settings, store, PEPPER, clock=clock)
    yield made
    await made.close()


async def test_each_tenant_hears_of_its_own_and_of_what_it_asked_for(endpoints, settings):
    declared = settings.endpoints[0].id
    all_of_it = await endpoints.create("acme", URL, [])
    responses = await endpoints.create("acme", URL + "/r", ["response.completed"])
    others = await endpoints.create("zenith", URL, ["*"])
    assert set((await endpoints.names("acme", "batch")).split()) == {declared, all_of_it.id}
    assert set((await endpoints.names("acme", "response")).split()) == {all_of_it.id, responses.id}
    assert await endpoints.names("zenith", "batch") == others.id
    assert await endpoints.names("nobody", "batch") == ""
    assert await endpoints.names("acme", "held") == ""


async def test_a_request_may_name_a_receiver_of_its_own(endpoints):
    assert await endpoints.names("nobody", "workers_ai", URL) == URL
    assert await endpoints.names("nobody", "workers_ai", "http://10.0.5.7:8080/x") == "http://10.0.5.7:8080/x"
    for url in (
        "http://10.0.6.7/",
        "https://127.0.0.1/",
        "https://[::ffff:7f00:1]/",
        "x",
        URL + " https://b.example/",
    ):
        with pytest.raises(ValueError):
            await endpoints.names("nobody", "workers_ai", url)


async def test_a_receiver_is_found_by_its_own_tenant_only(endpoints, settings):
    stored = await endpoints.create("acme", URL, ["batch.completed"])
    found = await endpoints.receiver("acme", stored.id, "batch.completed")
    assert (found.url, [str(network) for network in found.allowed]) == (URL, ["10.0.5.0/24"])
    assert await endpoints.receiver("zenith", stored.id, "batch.completed") is None
    assert await endpoints.receiver("zenith", settings.endpoints[0].id, "batch.completed") is None
    assert await endpoints.receiver("acme", stored.id, "batch.failed") is None
    assert await endpoints.receiver("acme", settings.endpoints[0].id, "response.completed") is None
    assert await endpoints.receiver("acme", "we_nothing", "batch.completed") is None


async def test_no_two_receivers_share_a_secret(endpoints):
    made = [await endpoints.create("acme", URL, []) for _ in range(2)]
    made += [await endpoints.find("acme"), await endpoints.find("zenith")]
    secrets = {endpoints.secrets_of(each)[0] for each in made}
    assert len(secrets) == 4
    assert {len(secret) for secret in secrets} == {32}


@pytest.mark.parametrize("is_of_requests", [False, True])
async def test_a_rotation_signs_with_both_secrets_for_a_while(endpoints, clock, is_of_requests):
    made = await (endpoints.find("acme") if is_of_requests else endpoints.create("acme", URL, []))
    name = URL if is_of_requests else made.id
    before = endpoints.secret_text(made)
    changed = await endpoints.rotate(made, 3600)
    after = endpoints.secret_text(changed)
    assert before != after
    both = await endpoints.receiver("acme", name, "batch.completed")
    assert [base64.b64encode(secret).decode() for secret in both.secrets] == [after[6:], before[6:]]
    clock.now += 3600
    later = await endpoints.receiver("acme", name, "batch.completed")
    assert [base64.b64encode(secret).decode() for secret in later.secrets] == [after[6:]]


async def test_the_official_sdk_verifies_what_either_secret_signed(endpoints):
    made = await endpoints.create("acme", URL, [])
    before = endpoints.secret_text(made)
    changed = await endpoints.rotate(made, 3600)
    body = b'{"id":"evt_1","object":"event","type":"batch.completed","created_at":1,"data":{"id":"batch_1"}}'
    sent = int(time.time())
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(sent),
        "webhook-signature": signature(endpoints.secrets_of(changed), "msg_1", sent, body),
    }
    for secret in (before, endpoints.secret_text(changed)):
        client = openai.OpenAI(api_key="x", webhook_secret=secret)
        event = client.webhooks.unwrap(body, headers)
        assert (event.type, event.data.id) == ("batch.completed", "batch_1")
    with pytest.raises(openai.InvalidWebhookSignatureError):
        openai.OpenAI(api_key="x", webhook_secret=SECRET).webhooks.unwrap(body, headers)


async def test_a_receiver_that_is_gone_is_disabled_until_it_is_enabled(endpoints, settings):
    made = await endpoints.create("acme", URL, [])
    await endpoints.disable("zenith", made.id, "not theirs")
    assert await endpoints.receiver("acme", made.id, "batch.failed") is not None
    await endpoints.disable("acme", made.id, "it answered 410")
    await endpoints.disable("acme", settings.endpoints[0].id, "it answered 410")
    assert await endpoints.receiver("acme", made.id, "batch.failed") is None
    assert made.id not in await endpoints.names("acme", "batch")
    (listed,) = await endpoints.listed("acme")
    assert listed.disabled_because == "it answered 410"
    await endpoints.enable(listed)
    assert await endpoints.receiver("acme", made.id, "batch.failed") is not None


async def test_what_another_process_makes_is_known_in_two_seconds(endpoints, settings, store, clock):
    assert await endpoints.names("zenith", "batch") == ""
    made = await Endpoints(lambda: settings, store, PEPPER, clock=clock).create("zenith", URL, [])
    clock.now += 2
    assert await endpoints.names("zenith", "batch") == made.id
    assert await endpoints.remove(made)
    assert not await endpoints.remove(made)
    assert await endpoints.names("zenith", "batch") == ""


async def test_what_cannot_be_an_endpoint_says_why(endpoints):
    with pytest.raises(ValueError, match=r"there is no event batch\.done"):
        await endpoints.create("acme", URL, ["batch.done"])
    with pytest.raises(ValueError, match="must be public"):
        await endpoints.create("acme", "https://169.254.169.254/latest", [])
    for _ in range(MOST_PER_TENANT):
        await endpoints.create("acme", URL, [])
    with pytest.raises(ValueError, match="at most"):
        await endpoints.create("acme", URL, [])


def test_every_event_of_the_official_sdk_that_we_have_a_source_for_is_there():
    of_openai = {f"batch.{state}" for state in ("completed", "failed", "expired", "cancelled")}
    of_openai |= {f"response.{state}" for state in ("completed", "failed", "cancelled", "incomplete")}
    of_cloudflare = {f"cf.workersAi.model.batch.{state}" for state in ("queued", "succeeded", "failed")}
    assert of_openai | of_cloudflare <= set(ALL_EVENTS)


@pytest.mark.parametrize("network", ["10.0.5.1/24", "office", "10.0.0.0/33"])
def test_what_is_no_network_is_refused(network):
    with pytest.raises(ValueError, match="is written as a network"):
        QueueWebhooksConfig(networks=[network])
