"""What only the store in Redis has: it must be filled, its keys have an end; and the state machine of limits over it."""

import asyncio
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from gateway.stores.limit_redis import NotFilledError, RedisLimitStore
from gateway.stores.redis_connection import RedisConnection
from policies.limits.limit import Limit, Scope, Window
from policies.limits.messages import Counter, Reading, Reply, Update
from tests.support import limit_machine
from tests.support.redis_server import RedisServer

TTL_US = 10_000_000
DAY_US = 86_400_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


class MachineStore:
    """The store as the state machine wants it: synchronous, with a clock that is set."""

    def __init__(self, server: RedisServer) -> None:
        server.command("FLUSHALL")
        self.now_us = limit_machine.START_S * 1_000_000
        self._loop = asyncio.new_event_loop()
        connection = RedisConnection(server.url, "headgate", timeout_s=30.0)
        self._store = RedisLimitStore(connection, now_us=lambda: self.now_us)
        self._loop.run_until_complete(self._store.fill([]))

    def wait(self, seconds: float) -> None:
        self.now_us += int(seconds * 1e6)

    def apply(self, update: Update) -> Reply:
        return self._loop.run_until_complete(self._store.update(update))

    def look(self, counters: Sequence[Counter]) -> tuple[int, list[Reading]]:
        return self._loop.run_until_complete(self._store.read(counters))

    def close(self) -> None:
        self._loop.run_until_complete(self._store.close())
        self._loop.close()


@pytest.mark.parametrize("over_admission", [0.0, 0.5])
def test_limits_hold_whatever_happens_in_whatever_order(server, over_admission) -> None:
    machine = limit_machine.machine(lambda: MachineStore(server), over_admission=over_admission)
    run_state_machine_as_test(machine, settings=settings(**limit_machine.settings()))


def a_counter(measure: str, span: str, amount: int = 100, **fields) -> Counter:
    window = Window(span, 60 if span in ("rate", "rolling") else 0)
    limit = Limit("l", Scope("key", "k"), measure, amount, window, **fields)
    return limit.counter(f"{measure}-{span}", time.time_ns() // 1000)


MONEY, TOTAL = a_counter("money", "day"), a_counter("money", "total")


async def test_a_redis_that_knows_nothing_takes_no_updates_until_it_is_filled(server) -> None:
    server.command("FLUSHALL")
    store = RedisLimitStore(RedisConnection(server.url, "headgate", timeout_s=30.0))
    with pytest.raises(NotFilledError):
        await store.update(Update("a", 1, TTL_US, (MONEY,), groups=(((0, 1),),)))
    with pytest.raises(NotFilledError):
        await store.read((MONEY,))
    assert not await store.is_filled()
    await store.fill([(MONEY, {MONEY.periods[0]: 30, MONEY.periods[0] - DAY_US: 5}), (TOTAL, {0: 99})])
    await store.fill([(MONEY, {MONEY.periods[0]: 1})])  # too late
    assert await store.is_filled()
    _, stands = await store.read((MONEY, TOTAL))
    assert [(s.spent, s.held) for s in stands] == [(30, 0), (99, 0)]
    await store.close()


async def test_a_filling_that_broke_off_may_be_repeated(server) -> None:
    server.command("FLUSHALL")
    connection = RedisConnection(server.url, "headgate", timeout_s=30.0)
    store = RedisLimitStore(connection)
    many = [(MONEY, {MONEY.periods[0]: 30})]
    call = connection.call

    async def dies(*words, **options):
        if words[0] == "HSETNX":
            raise ConnectionError
        return await call(*words, **options)

    connection.call = dies
    with pytest.raises(ConnectionError):
        await store.fill(many)
    connection.call = call
    await store.fill(many)
    assert (await store.read((MONEY,)))[1][0].spent == 30
    await store.close()


async def test_what_redis_keeps_has_an_end(server) -> None:
    server.command("FLUSHALL")
    store = RedisLimitStore(RedisConnection(server.url, "headgate", timeout_s=30.0))
    await store.fill([])
    kinds = (
        *(MONEY, TOTAL, a_counter("tokens", "rolling"), a_counter("requests", "rate")),
        a_counter("concurrent_requests", "now"),
    )
    posts, groups = ((0, 0, 1), (1, 0, 1), (2, 0, 1)), (((3, 1), (4, 1)),)
    await store.update(Update("a", 1, TTL_US, kinds, posts=posts, groups=groups))
    lives = {key.decode(): server.command("PTTL", key) for key in server.command("KEYS", "*")}
    endless = {key.partition(":limits:")[2] for key, life_ms in lives.items() if life_ms < 0}
    assert endless == {"clock", "holders", "counter:key/money-total/l"}
    await store.close()


async def test_one_node_at_a_time_has_the_turn(server) -> None:
    server.command("FLUSHALL")
    one, two = (RedisLimitStore(RedisConnection(server.url, "headgate", timeout_s=30.0)) for _ in range(2))
    assert await one.take_turn(60)
    assert not await two.take_turn(60)
    await two.end_turn()  # not its own
    assert not await two.take_turn(60)
    await one.end_turn()
    assert await two.take_turn(60)
    await one.close()
    await two.close()
