"""The worker's conversation with the store: who waits is answered, who has gone gives back, and the end leaves nothing."""

import asyncio
import itertools
import time

import pytest

from backends.dialect import CHAT
from gateway.leases import Leases
from gateway.stores.limit_sqlite import SqliteLimitStore
from gateway.stores.limit_store import StoreAwayError
from policies.exchange import Caller, Exchange
from policies.limits.book import LimitBook
from policies.limits.holding import Holding
from policies.limits.limit import Limit, Scope, Window
from policies.limits.messages import Reading
from policies.limits.policy import Limits
from policies.routing import Model

SLOTS = Limit("slots", Scope("key"), "concurrent_requests", 3, Window("now"))
CALLER, MODEL = Caller("k", "k"), Model("m", ())


class Doors:
    """The real store behind a door that can be shut, and one that is locked."""

    def __init__(self, storage) -> None:
        self.store = SqliteLimitStore(storage)
        self.is_away = False
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.groups = 0  # asked for in all

    async def update(self, update):
        await self.is_open.wait()
        if self.is_away:
            raise StoreAwayError("nobody is in")
        self.groups += len(update.groups)
        return await self.store.update(update)

    async def read(self, counters):
        return await self.store.read(counters)

    async def close(self) -> None:
        await self.store.close()


class Worker:
    def __init__(self, storage, limit: Limit = SLOTS) -> None:
        names = (f"{id(self)}-{number}" for number in itertools.count())
        self.doors = Doors(storage)
        self.limit = limit
        self.seen: list[str] = []
        self.holding = Holding(lambda: next(names))
        self.leases = Leases(lambda: self.doors, self.holding, self._observe)
        self.policy = Limits(LimitBook([limit]), self.holding, self.leases.wake)
        self.leases.start()

    def _observe(self, accounts) -> None:
        self.seen += [account.limit.name for account in accounts]

    async def admit(self) -> tuple[Exchange, object]:
        now = time.perf_counter()
        exchange = Exchange("r", CHAT, now, time.time(), caller=CALLER, model=MODEL)
        denial = self.policy.admit(exchange, now)
        if denial is None and exchange.lacks:
            try:
                denial = await self.leases.obtain(exchange)
            except asyncio.CancelledError:
                self.policy.settle(exchange, now)
                raise
        return exchange, denial

    def settle(self, exchange: Exchange) -> None:
        self.policy.settle(exchange, time.perf_counter())

    async def stands(self) -> Reading:
        (reading,) = (await self.doors.read([self.limit.counter("k", 1)]))[1]
        return reading

    async def held_is(self, held: int) -> None:
        async with asyncio.timeout(30):
            while (await self.stands()).held != held:
                await asyncio.sleep(0.01)


@pytest.fixture
async def worker(tmp_path):
    worker = Worker(tmp_path)
    yield worker
    await worker.leases.stop()


async def test_the_fourth_of_three_is_refused_with_figures_and_may_come_when_one_has_ended(worker) -> None:
    admitted = [await worker.admit() for _ in range(3)]
    assert [denial for _, denial in admitted] == [None] * 3
    exchange, denial = await worker.admit()
    refused = denial.refused
    assert (denial.status, denial.code, denial.retry_after_s) == (429, "concurrency_limit_exceeded", 1.0)
    assert (refused.limit, refused.level, refused.scope) == ("slots", "key", "k")
    assert (refused.amount, refused.spent, refused.reserved, refused.requested) == (3, 0, 3, 1)
    worker.settle(exchange)
    worker.settle(admitted[0][0])
    assert (await worker.admit())[1] is None
    assert "slots" in worker.seen


async def test_all_that_wait_go_in_one_update(worker) -> None:
    await worker.admit()
    before = worker.leases.updates
    worker.doors.is_open.clear()
    waiting = [asyncio.ensure_future(worker.admit()) for _ in range(50)]
    await asyncio.sleep(0)
    worker.doors.is_open.set()
    outcomes = await asyncio.gather(*waiting)
    assert sum(denial is None for _, denial in outcomes) == 2
    assert worker.leases.updates - before <= 3


async def test_whoever_leaves_while_the_store_is_asked_has_nothing_reserved(worker) -> None:
    await worker.admit()
    worker.doors.is_open.clear()
    waiting = [asyncio.ensure_future(worker.admit()) for _ in range(2)]
    async with asyncio.timeout(30):
        while worker.holding.sent is None or not worker.holding.sent.groups:
            await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    worker.doors.is_open.set()
    await worker.held_is(1)
    assert worker.doors.groups == 3, "they had been asked for"


async def test_whoever_leaves_in_the_turn_of_the_answer_gives_it_back(worker) -> None:
    task = asyncio.ensure_future(worker.admit())
    handed_out = worker.leases._hand_out

    def and_leave(outcomes) -> None:
        handed_out(outcomes)
        task.cancel()

    worker.leases._hand_out = and_leave
    with pytest.raises(asyncio.CancelledError):
        await task
    worker.leases._hand_out = handed_out
    await worker.held_is(0)


async def test_while_the_store_is_away_who_must_ask_is_told_so_at_once_and_nothing_is_lost(worker) -> None:
    exchange, _ = await worker.admit()
    worker.doors.is_away = True
    other, denial = await worker.admit()
    assert (denial.status, denial.code) == (503, "limits_unavailable")
    worker.settle(other)
    another = asyncio.ensure_future(worker.admit())
    await asyncio.sleep(0)
    assert another.done(), "it waits for a store that is known to be away"
    assert another.result()[1].status == 503
    worker.settle(exchange)
    worker.doors.is_away = False
    await worker.held_is(0)
    assert worker.leases.failures >= 1


async def test_the_end_posts_what_was_spent_and_gives_back_what_was_held(tmp_path) -> None:
    tokens = Limit("tokens", Scope("key"), "requests", 1_000_000, Window("total"))
    worker = Worker(tmp_path, tokens)
    for _ in range(20):
        exchange, denial = await worker.admit()
        assert denial is None
        exchange.dispatched_at = time.perf_counter()
        worker.settle(exchange)
    await worker.leases.stop()
    after = SqliteLimitStore(tmp_path)
    now_us, _ = after.look([])
    assert after.look([tokens.counter("k", now_us)])[1] == [Reading(20, 0, 0)]
    after.shut()


async def test_two_workers_share_one_limit(tmp_path) -> None:
    workers = [Worker(tmp_path), Worker(tmp_path)]
    outcomes = await asyncio.gather(*(worker.admit() for worker in workers * 4))
    assert sum(denial is None for _, denial in outcomes) == 3
    for worker in workers:
        await worker.leases.stop()
