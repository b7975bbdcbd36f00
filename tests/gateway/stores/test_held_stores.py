"""Both stores of held jobs, asked the same."""

import asyncio

import pytest

from gateway.overflow.held import Held, scope_of
from gateway.stores.held_redis import RedisHeldStore
from gateway.stores.held_sqlite import SqliteHeldStore
from gateway.stores.redis_connection import RedisConnection
from policies.exchange import Caller
from tests.support.redis_server import RedisServer

ONE, TWO = Held("job_1", "t", b"scope"), Held("job_2", "t", b"scope")


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["sqlite", "redis"])
async def stores(request, tmp_path):
    """Two processes' views of the same."""
    if request.param == "sqlite":
        pair = [SqliteHeldStore(tmp_path) for _ in range(2)]
    else:
        url = request.getfixturevalue("redis").url
        pair = [RedisHeldStore(RedisConnection(url, tmp_path.name, timeout_s=10)) for _ in range(2)]
    yield pair
    for store in pair:
        await store.close()


async def test_nobody_takes_up_what_somebody_waits_for(stores):
    ours, theirs = stores
    assert not await theirs.is_any()
    await ours.hold(ONE, 300)
    assert await theirs.is_any()
    assert await theirs.take_up(b"scope", 300) is None


async def test_what_was_left_is_taken_up_once(stores):
    ours, theirs = stores
    await ours.hold(ONE, 300)
    await ours.leave(ONE.job_id)
    assert await theirs.take_up(b"other", 300) is None
    taken = await asyncio.gather(theirs.take_up(b"scope", 300), ours.take_up(b"scope", 300))
    assert sorted(taken, key=str) == sorted([ONE, None], key=str)
    await theirs.leave(ONE.job_id)
    assert await ours.take_up(b"scope", 300) == ONE


async def test_the_oldest_is_taken_up_first(stores):
    ours, theirs = stores
    for held in (ONE, TWO):
        await ours.hold(held, 300)
        await ours.leave(held.job_id)
        await asyncio.sleep(0.002)
    assert [await theirs.take_up(b"scope", 300) for _ in range(3)] == [ONE, TWO, None]


async def test_an_audience_that_is_not_renewed_ends_by_itself(stores):
    ours, theirs = stores
    await ours.hold(ONE, 0.0)
    await asyncio.sleep(0.002)
    assert await theirs.take_up(b"scope", 300) == ONE


async def test_what_was_answered_is_forgotten(stores):
    ours, theirs = stores
    await ours.hold(ONE, 300)
    await ours.forget(ONE.job_id)
    assert await theirs.take_up(b"scope", 300) is None
    assert not await theirs.is_any()


async def test_what_nobody_came_back_for_is_given_up_once(stores):
    ours, theirs = stores
    await ours.hold(ONE, 0.0)
    await ours.hold(TWO, 300)
    await asyncio.sleep(0.002)
    assert await theirs.abandoned(300) == []
    assert await theirs.abandoned(0) == [ONE]
    assert await ours.abandoned(0) == []
    assert await ours.take_up(b"scope", 300) is None


def test_a_scope_is_of_one_key_path_body_and_idempotency_key():
    ada, bob = Caller("k1", "ada", team="t"), Caller("k2", "bob", team="t")
    scopes = {
        scope_of(ada, "/v1/a", b"body"),
        scope_of(bob, "/v1/a", b"body"),
        scope_of(ada, "/v1/b", b"body"),
        scope_of(ada, "/v1/a", b"other"),
        scope_of(ada, "/v1/a", b"body", b"key"),
    }
    assert len(scopes) == 5
    assert scope_of(ada, "/v1/a", b"body") in scopes
