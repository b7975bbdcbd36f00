"""Waiting for room, with real futures; who leaves, and what they hold."""

import asyncio

import pytest

from backends.load import EndpointLoad
from gateway.waiting_room import WaitingRoom
from policies.exchange import Exchange
from policies.health.book import HealthBook
from policies.placement.hold import Hold
from policies.placement.place import choose
from policies.placement.priority import PrioritiesConfig
from tests.support.builders import a_caller, a_model, an_exchange

SYSTEM, INTERACTIVE, DEFAULT, BULK = range(4)


class Pool:
    """Two endpoints with a slot each, both taken, and the room before them."""

    def __init__(self, **classes):
        self.model = a_model(endpoints=2, max_in_flight=1)
        for candidate in self.model.candidates(an_exchange().dialect):
            candidate.endpoint.max_in_flight = 1
        self.room = WaitingRoom(PrioritiesConfig.model_validate(classes).classes())
        self.holds = [Hold(endpoint, 0) for endpoint in self.endpoints]
        self.order = []

    @property
    def endpoints(self) -> list[EndpointLoad]:
        return [candidate.endpoint for candidate in self.model.candidates(an_exchange().dialect)]

    def comes(self, tenant="t", priority=DEFAULT) -> asyncio.Task:
        exchange = an_exchange(model=self.model, priority=priority)
        exchange.caller = a_caller(tenant)
        return asyncio.create_task(self._wait(exchange, tenant))

    async def _wait(self, exchange: Exchange, name: str):
        (group,) = self.model.groups(exchange.dialect)
        choice = await self.room.wait(exchange, "pool", lambda e, now: choose(e, group, HealthBook(), now))
        if choice is None:
            return None
        self.order.append(name)
        return Hold(choice.candidates[0].endpoint, 0)

    def frees(self, hold: Hold) -> None:
        hold.release()
        self.room.ended("pool", 0.1)

    @property
    def in_flight(self) -> int:
        return sum(endpoint.in_flight for endpoint in self.endpoints)


async def settle_down():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_item_12_who_waits_is_let_in_when_a_slot_is_free():
    pool = Pool()
    task = pool.comes()
    await settle_down()
    assert pool.room.sizes() == {"pool": 1}
    pool.frees(pool.holds[0])
    hold = await task
    assert pool.in_flight == 2
    hold.release()


async def test_one_slot_lets_one_in_however_many_wait():
    pool = Pool()
    tasks = [pool.comes() for _ in range(10)]
    await settle_down()
    pool.frees(pool.holds[0])
    await settle_down()
    assert sum(task.done() for task in tasks) == 1
    assert pool.in_flight == 2
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert pool.room.sizes() == {"pool": 0}


async def test_a_slot_is_held_from_the_moment_somebody_is_let_in():
    pool = Pool()
    task = pool.comes()
    await settle_down()
    pool.frees(pool.holds[0])
    assert not task.done()  # told, but not run yet
    assert pool.in_flight == 2
    (await task).release()


async def test_item_13_a_client_that_is_gone_leaves_the_room_at_once():
    pool = Pool()
    gone, stays = pool.comes("gone"), pool.comes("stays")
    await settle_down()
    gone.cancel()
    await settle_down()
    assert pool.room.sizes() == {"pool": 1}
    pool.frees(pool.holds[0])
    (await stays).release()
    assert pool.order == ["stays"]
    assert pool.room.counts["left"] == 1


async def test_a_slot_given_to_one_who_goes_in_that_moment_goes_to_the_next():
    pool = Pool()
    first, second = pool.comes("first"), pool.comes("second")
    await settle_down()
    pool.frees(pool.holds[0])
    first.cancel()  # let in already, but it has not run
    with pytest.raises(asyncio.CancelledError):
        await first
    (await second).release()
    pool.frees(pool.holds[1])
    assert pool.in_flight == 0


async def test_item_13_classes_and_tenants_take_their_turns():
    pool = Pool()
    tasks = [pool.comes(tenant, priority) for tenant, priority in
             [("bulk", BULK), ("a", DEFAULT), ("a", DEFAULT), ("b", DEFAULT), ("me", INTERACTIVE)]]  # fmt: skip
    await settle_down()
    served = {}
    hold = pool.holds[0]
    for _ in tasks:
        pool.frees(hold)
        await settle_down()
        (task,) = [task for task in tasks if task.done() and task not in served]
        hold = served[task] = task.result()
    assert pool.order == ["me", "a", "b", "a", "bulk"]


async def test_waiting_is_bounded_in_time():
    pool = Pool(default={"wait_s": 0.05})
    assert await pool.comes() is None
    assert pool.room.counts["timed_out"] == 1
    assert pool.room.sizes() == {"pool": 0}


async def test_the_room_is_bounded():
    pool = Pool(default={"waiting": 1})
    task = pool.comes()
    await settle_down()
    assert await pool.comes() is None
    assert pool.room.counts["turned_away"] == 1
    task.cancel()
    await settle_down()


async def test_what_frees_no_slot_of_ours_is_noticed_all_the_same():
    pool = Pool()
    task = pool.comes()
    await settle_down()
    pool.endpoints[0].max_in_flight = 5  # as a reload, a scrape or a healed endpoint would
    (await asyncio.wait_for(task, 30)).release()


async def test_a_newcomer_does_not_pass_those_who_wait():
    pool = Pool()
    task = pool.comes(priority=DEFAULT)
    await settle_down()
    assert pool.room.is_awaited("pool", DEFAULT)
    assert pool.room.is_awaited("pool", BULK)
    assert not pool.room.is_awaited("pool", INTERACTIVE)
    task.cancel()
    await settle_down()
