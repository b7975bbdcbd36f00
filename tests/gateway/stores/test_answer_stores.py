"""One suite for both stores of answers, and what only Redis does."""

import asyncio

import pytest

from gateway.idempotency import SqliteAnswers
from gateway.stores.answer_table import Asked, KeptAnswer
from gateway.stores.answers_redis import RedisAnswers
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.redis_connection import RedisConnection
from tests.support.redis_server import RedisServer

ANSWER = KeptAnswer("req_1", 200, b'[["a","b"]]', b"\x00\xffhello", is_stream=True)


def asked(owner: str = "req_1", scope: bytes = b"\x01scope", body: bytes = b"body") -> Asked:
    return Asked(scope, body, "k1", owner)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


def in_redis(server: RedisServer, total_bytes: int = 1_000_000) -> RedisAnswers:
    return RedisAnswers(RedisConnection(server.url, "t", timeout_s=2.0), total_bytes)


@pytest.fixture(params=["sqlite", "redis"])
async def stores(request, tmp_path, server):
    """Two workers' views of one store."""
    if request.param == "redis":
        server.command("FLUSHALL")
        pair = in_redis(server), in_redis(server)
    else:
        pair = SqliteAnswers(tmp_path), SqliteAnswers(tmp_path)
    yield pair
    for store in pair:
        await store.close()


async def test_the_first_claim_wins_everywhere(stores):
    one, other = stores
    assert (await one.claim(asked(), 60)).state == "mine"
    assert (await other.claim(asked("req_2"), 60)).state == "running"
    assert (await other.claim(asked("req_2", body=b"else"), 60)).state == "other_body"
    assert (await other.claim(asked("req_2", scope=b"another"), 60)).state == "mine"


async def test_a_kept_answer_is_the_same_bytes_everywhere(stores):
    one, other = stores
    await one.claim(asked(), 60)
    await one.finish(b"\x01scope", "req_1", ANSWER)
    found = await other.claim(asked("req_2"), 60)
    assert (found.state, found.answer) == ("done", ANSWER)
    assert (await other.claim(asked("req_2", body=b"else"), 60)).state == "other_body"


async def test_what_is_given_back_is_free_and_only_its_owner_gives_it_back(stores):
    one, other = stores
    await one.claim(asked(), 60)
    await other.release(b"\x01scope", "req_2")
    await other.finish(b"\x01scope", "req_2", ANSWER)
    assert (await other.claim(asked("req_2"), 60)).state == "running"
    await one.release(b"\x01scope", "req_1")
    assert (await other.claim(asked("req_2"), 60)).state == "mine"


async def test_a_kept_answer_is_not_changed_by_a_late_owner(stores):
    one, other = stores
    await one.claim(asked(), 60)
    await one.finish(b"\x01scope", "req_1", ANSWER)
    await one.finish(b"\x01scope", "req_1", KeptAnswer("req_1", 500, b"[]", b"", is_stream=False))
    await one.release(b"\x01scope", "req_1")
    assert (await other.claim(asked("req_2"), 60)).answer == ANSWER


async def test_of_many_at_once_one_wins(stores):
    claims = await asyncio.gather(
        *(stores[number % 2].claim(asked(f"req_{number}"), 60) for number in range(20))
    )
    assert sorted(claim.state for claim in claims) == ["mine"] + ["running"] * 19


async def test_in_redis_a_dead_owners_claim_ends_by_itself_and_a_live_ones_is_renewed(server):
    server.command("FLUSHALL")
    store = in_redis(server)
    key = f"{{t}}:answer:{asked().scope.hex()}"
    await store.claim(asked(), 60)
    server.command("PEXPIRE", key, 5000)
    await store.renew(["req_1", "req_unknown"])
    assert server.command("PTTL", key) > 20_000
    await store.finish(asked().scope, "req_1", ANSWER)
    assert 50_000 < server.command("PTTL", key) <= 60_000
    await store.close()


async def test_in_redis_the_oldest_go_beyond_the_total(server):
    server.command("FLUSHALL")
    store = in_redis(server, total_bytes=5000)
    for number in range(10):
        scope = b"%d" % number
        await store.claim(asked(f"req_{number}", scope), 60 + number)
        await store.finish(
            scope, f"req_{number}", KeptAnswer(f"req_{number}", 200, b"[]", b"x" * 1000, is_stream=False)
        )
    states = [(await store.claim(asked("again", b"%d" % number), 60)).state for number in range(10)]
    assert states == ["mine"] * 5 + ["done"] * 5
    assert int(server.command("GET", "{t}:answers:bytes")) == 5000
    await store.close()


async def test_a_redis_that_is_away_says_so_and_holds_nobody_up(tmp_path):
    with RedisServer(tmp_path) as server:
        store = RedisAnswers(RedisConnection(server.url, "t", timeout_s=0.1), 1000)
        await store.claim(asked(), 60)
        server.freeze()
        try:
            outcomes = await asyncio.gather(
                *(store.claim(asked(f"req_{n}"), 60) for n in range(5)), return_exceptions=True
            )
        finally:
            server.thaw()
    assert all(isinstance(outcome, StoreAwayError) for outcome in outcomes)
    await store.close()
