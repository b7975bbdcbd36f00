"""What becomes of a request when nothing can take it now: waiting, parking, refusing."""

import asyncio

import pytest

from backends.dialect import EMBEDDINGS
from gateway.control import Wanted
from gateway.placing import Placing
from gateway.waiting_room import WaitingRoom
from gateway.waking import Waking
from policies.health.book import HealthBook
from policies.placement.priority import PrioritiesConfig
from policies.verdict import Denial
from tests.support.builders import a_model, a_provider, an_exchange


class Runtime:
    """Only what placing looks at."""

    def __init__(self):
        self.health = HealthBook()


def a_room(wait_s=5.0):
    return WaitingRoom(PrioritiesConfig.model_validate({"default": {"wait_s": wait_s}}).classes())


def draining(model):
    for candidate in model.candidates(an_exchange().dialect):
        candidate.endpoint.is_draining = True
    return model


def full(model):
    for candidate in model.candidates(an_exchange().dialect):
        candidate.endpoint.max_in_flight = candidate.endpoint.in_flight = 1
    return model


async def when_full(placing, exchange):
    assert placing.at_once(exchange, Runtime()) is None
    return await placing.when_full(exchange, Runtime(), None, None)


async def test_item_25_while_all_replicas_restart_requests_wait_for_the_first_that_is_back():
    model = draining(a_model(endpoints=3))
    waiting = asyncio.create_task(when_full(Placing(a_room()), an_exchange(model=model)))
    await asyncio.sleep(0)
    back = model.candidates(an_exchange().dialect)[1]
    back.endpoint.is_draining = False
    assert [c.endpoint.name for c in await waiting] == [back.endpoint.name]


async def test_item_25_if_none_comes_back_it_is_said_and_when_to_come_again():
    denial = await when_full(Placing(a_room(0.05)), an_exchange(model=draining(a_model(endpoints=3))))
    assert isinstance(denial, Denial)
    assert (denial.status, denial.code) == (503, "no_endpoint")
    assert denial.retry_after_s > 0


async def test_item_24_a_replica_that_drains_gets_nothing_new_and_its_sessions_come_home():
    model = a_model(endpoints=4)
    placing = Placing(a_room())

    def home_of(session):
        return placing.at_once(an_exchange(model=model, session_hash=session), Runtime())[0].endpoint

    before = {session: home_of(session) for session in range(1, 200)}
    drains = before[1]
    drains.is_draining = True
    for session, endpoint in before.items():
        now = home_of(session)
        assert now is not drains
        assert endpoint is drains or now is endpoint
    drains.is_draining = False
    assert {session: home_of(session) for session in before} == before


@pytest.mark.parametrize("on_full", ["", "queue"])
async def test_a_queue_takes_what_there_is_no_room_for(on_full):
    parked = []

    async def park(exchange, request, message):
        parked.append(exchange)
        return True

    exchange = an_exchange(model=full(a_model(endpoints=2)), on_full=on_full)
    assert await when_full(Placing(a_room(0.05), park), exchange) is None
    assert parked == [exchange]


async def test_a_queue_that_wants_it_not_leaves_it_to_be_refused():
    async def park(exchange, request, message):
        return False

    denial = await when_full(Placing(a_room(0.05), park), an_exchange(model=full(a_model(endpoints=2))))
    assert denial.code == "wait_timeout"


async def test_a_dialect_that_no_target_speaks_is_refused_with_those_it_does():
    model = a_model(endpoints=2)
    for endpoint in model.targets[0].pool.endpoints:
        endpoint.provider = a_provider(paths={"chat": "/chat/completions"})
    denial = Placing(a_room()).at_once(an_exchange(EMBEDDINGS, model=model), Runtime())
    assert (denial.status, denial.code) == (400, "dialect_not_supported")
    assert "/v1/chat/completions" in denial.message


async def test_a_pool_of_which_nothing_takes_requests_is_said_to_be_wanted_and_a_full_one_is_not():
    wanted = []
    placing = Placing(a_room(0.05), want=wanted.append)
    await when_full(placing, an_exchange(model=full(a_model(endpoints=2))))
    assert wanted == []
    model = draining(a_model(endpoints=2))
    await when_full(placing, an_exchange(model=model))
    assert set(wanted) == {model.targets[0].pool.name}


async def test_who_waits_for_a_pool_that_goes_to_sleep_says_that_it_is_wanted():
    wanted = []
    model = full(a_model(endpoints=2))
    waiting = asyncio.create_task(
        when_full(Placing(a_room(60.0), want=wanted.append), an_exchange(model=model))
    )
    await asyncio.sleep(0)
    assert wanted == []
    draining(model)
    async with asyncio.timeout(30.0):
        while not wanted:
            await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert set(wanted) == {model.targets[0].pool.name}


def test_what_is_wanted_is_told_the_parent_once_in_a_while():
    told = []
    waking = Waking()
    waking.want("gpu")  # nobody to tell yet
    waking.attach(told.append)
    for _ in range(100):
        waking.want("gpu")
    waking.want("other")
    assert told == [Wanted("gpu"), Wanted("other")]
