"""One suite for every store of limits: each says what `policies.limits.counting` says, and holds what it promises."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.stores.limit_redis import RedisLimitStore
from gateway.stores.limit_sqlite import Clocks, SqliteLimitStore
from gateway.stores.limit_store import LimitStore
from gateway.stores.redis_connection import RedisConnection
from policies.limits.counting import Holder, State, apply, lapse, reading
from policies.limits.limit import Limit, Scope, Window
from policies.limits.messages import REMEMBERED_US, Counter, Reply, Update
from tests.support.redis_server import RedisServer

NOON_US = int(datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()) * 1_000_000
TTL_US = 10_000_000
MINUTE_US, DAY_US = 60_000_000, 86_400_000_000


@dataclass
class Clock:
    now_us: int = NOON_US


class Model:
    """The meaning itself, as a store."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.states: dict[str, State] = {}
        self.holders: dict[str, Holder] = {}

    async def update(self, update: Update) -> Reply:
        return apply(update, self.states, self.holders, self.clock.now_us)

    async def read(self, counters: Any) -> Any:
        lapse(self.states, self.holders, self.clock.now_us)
        now_us = self.clock.now_us
        return now_us, [reading(c, self.states.get(c.key, State()), now_us) for c in counters]

    async def close(self) -> None: ...


@dataclass
class Bench:
    """A store under test, its clock, and the loop it lives in."""

    store: LimitStore
    clock: Clock
    loop: asyncio.AbstractEventLoop
    numbers: dict[str, int] = field(default_factory=dict)

    def send(self, update: Update) -> Reply:
        return self.loop.run_until_complete(self.store.update(update))

    def read(self, *counters: Counter) -> list[Any]:
        return self.loop.run_until_complete(self.store.read(counters))[1]

    def say(self, holder: str, *counters: Counter, **said: Any) -> Reply:
        """The holder's next update."""
        self.numbers[holder] = number = self.numbers.get(holder, 0) + 1
        return self.send(Update(holder, number, TTL_US, counters, **said))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[RedisServer]:
    """One node that has all slots, and refuses a call whose keys are in several."""
    with RedisServer(tmp_path_factory.mktemp("cluster"), cluster_enabled="yes", databases="1") as server:
        server.command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        while b"cluster_state:ok" not in server.command("CLUSTER", "INFO"):
            pass
        yield server


@pytest.fixture(params=["sqlite", "alone", "cluster", "memory"])
def bench(request, tmp_path) -> Iterator[Bench]:
    loop, clock = asyncio.new_event_loop(), Clock()
    if request.param in ("alone", "cluster"):
        store = a_redis_store(request.getfixturevalue(request.param), clock, loop)
    else:
        store = a_sqlite_store(tmp_path, clock) if request.param == "sqlite" else Model(clock)
    yield Bench(store, clock, loop)
    loop.run_until_complete(store.close())
    loop.close()


def a_redis_store(server: RedisServer, clock: Clock, loop: asyncio.AbstractEventLoop) -> RedisLimitStore:
    server.command("FLUSHALL")
    connection = RedisConnection(server.url, "headgate", timeout_s=10.0)
    store = RedisLimitStore(connection, now_us=lambda: clock.now_us)
    loop.run_until_complete(store.fill([]))
    return store


def a_sqlite_store(directory: Any, clock: Clock) -> SqliteLimitStore:
    return SqliteLimitStore(directory, clocks=Clocks(lambda: clock.now_us, lambda: clock.now_us, "boot"))


def a_counter(measure: str = "money", span: str = "day", amount: int = 100, **fields: Any) -> Counter:
    window = Window(span, 60 if span in ("rate", "rolling") else 0)
    return Limit("l", Scope("key", "k"), measure, amount, window, **fields).counter(
        f"{measure}-{span}", NOON_US
    )


MONEY = a_counter()
TOTAL = a_counter("money", "total")
TOKENS = a_counter("tokens", "rolling")
REQUESTS = a_counter("requests", "rate", 6, burst=3)
SLOTS = a_counter("concurrent_requests", "now", 2)


def test_what_is_held_and_spent_never_goes_beyond_the_amount(bench) -> None:
    first = bench.say("a", MONEY, groups=(((0, 60),), ((0, 60),)))
    assert [refusal is None for refusal in first.refusals] == [True, False]
    assert (first.refusals[1].spent, first.refusals[1].held) == (0, 60)
    second = bench.say("b", MONEY, groups=(((0, 41),), ((0, 40),)))
    assert [refusal is None for refusal in second.refusals] == [False, True]
    assert second.holders == 2
    assert bench.read(MONEY)[0].held == 100


def test_a_group_takes_all_of_its_counters_or_none(bench) -> None:
    bench.say("a", SLOTS, groups=(((0, 2),),))
    reply = bench.say("b", MONEY, REQUESTS, SLOTS, groups=(((0, 10), (1, 1), (2, 1)),))
    assert reply.refusals[0].counter == 2
    assert [stands.held for stands in reply.readings] == [0, 0, 2]
    assert reply.readings[1].spent == 0


def test_spent_stays_when_its_holder_ends_and_held_does_not(bench) -> None:
    bench.say("a", MONEY, groups=(((0, 50),),))
    bench.say("a", MONEY, posts=((0, 0, 30),), releases=((0, 30),))
    stands = bench.read(MONEY)[0]
    assert (stands.spent, stands.held) == (30, 20)
    bench.say("a", is_last=True)
    stands = bench.read(MONEY)[0]
    assert (stands.spent, stands.held) == (30, 0)


def test_what_a_silent_holder_held_is_free_after_its_time(bench) -> None:
    bench.say("a", SLOTS, groups=(((0, 2),),))
    bench.clock.now_us += TTL_US - 1
    assert bench.say("b", SLOTS, groups=(((0, 1),),)).refusals[0] is not None
    bench.clock.now_us += 1
    assert bench.say("b", SLOTS, groups=(((0, 1),),)).refusals[0] is None
    late = bench.say("a", SLOTS, claims=((0, 2),))
    assert not late.is_known
    assert bench.read(SLOTS)[0].held == 1


def test_an_update_that_is_repeated_changes_nothing_and_is_answered_in_the_same_words(bench) -> None:
    update = Update("a", 1, TTL_US, (MONEY,), posts=((0, 0, 5),), groups=(((0, 7),),), wants=((0, 3),))
    first = bench.send(update)
    bench.clock.now_us += 1_000_000
    assert bench.send(update) == first
    stands = bench.read(MONEY)[0]
    assert (stands.spent, stands.held) == (5, 10)


def test_a_lapsed_holder_learns_whether_its_last_update_was_applied(bench) -> None:
    update = Update("a", 1, TTL_US, (MONEY,), posts=((0, 0, 5),))
    bench.send(update)
    bench.clock.now_us += TTL_US
    again = bench.send(update)
    assert (again.is_known, again.was_applied) == (False, True)
    lost = bench.send(Update("a", 2, TTL_US, (MONEY,), posts=((0, 0, 5),)))
    assert (lost.is_known, lost.was_applied) == (False, False)
    assert bench.read(MONEY)[0].spent == 5


@pytest.mark.parametrize("number", [2, 7])
def test_a_holder_that_is_not_known_must_begin_again(bench, number) -> None:
    reply = bench.send(Update("a", number, TTL_US, (MONEY,), posts=((0, 0, 5),)))
    assert not reply.is_known
    assert bench.read(MONEY)[0].spent == 0


def test_a_rolling_window_never_holds_more_than_its_amount(bench) -> None:
    bench.say("a", TOKENS, posts=((0, 0, 100),))
    refusal = bench.say("b", TOKENS, groups=(((0, 1),),)).refusals[0]
    assert refusal.fits_at_us == NOON_US + MINUTE_US + 1_000_000
    bench.clock.now_us = refusal.fits_at_us - 1
    assert bench.say("c", TOKENS, groups=(((0, 1),),)).refusals[0] is not None
    bench.clock.now_us = refusal.fits_at_us
    assert bench.say("d", TOKENS, groups=(((0, 100),),)).refusals[0] is None


def test_a_period_begins_with_nothing_spent(bench) -> None:
    bench.say("a", MONEY, posts=((0, 0, 100),))
    refusal = bench.say("a", MONEY, groups=(((0, 1),),)).refusals[0]
    assert refusal.fits_at_us == NOON_US + DAY_US // 2
    bench.clock.now_us = refusal.fits_at_us
    reply = bench.say("b", MONEY, groups=(((0, 1),),))  # it still thinks that it is yesterday
    assert reply.refusals == (None,)
    assert reply.readings[0].spent == 0


def test_a_rate_refills_evenly(bench) -> None:
    reply = bench.say("a", REQUESTS, groups=tuple(((0, 1),) for _ in range(4)))
    assert [refusal is None for refusal in reply.refusals] == [True, True, True, False]
    assert reply.refusals[3].fits_at_us == NOON_US + 10_000_000
    bench.clock.now_us += 9_999_999
    assert bench.say("b", REQUESTS, groups=(((0, 1),),)).refusals[0] is not None
    bench.clock.now_us += 1
    assert bench.say("b", REQUESTS, groups=(((0, 1),),)).refusals[0] is None


def test_a_correction_may_be_negative_and_for_another_period(bench) -> None:
    yesterday = MONEY.periods[0] - DAY_US
    bench.say("a", MONEY, posts=((0, 0, 50), (0, yesterday, 70), (0, 0, -20)))
    assert bench.read(MONEY)[0].spent == 30


def test_time_never_runs_backwards(bench) -> None:
    if isinstance(bench.store, Model):
        pytest.skip("the model is given its time")
    bench.say("a", SLOTS, groups=(((0, 2),),))
    before = bench.say("a").now_us
    if isinstance(bench.store, RedisLimitStore):
        bench.clock.now_us -= DAY_US
    assert bench.say("a").now_us >= before


counters = st.sampled_from(
    [
        *(MONEY, TOTAL, TOKENS, REQUESTS, SLOTS),
        *(a_counter(amount=0), a_counter("requests", "rate", 0), a_counter("tokens", "rolling", 7)),
        a_counter("requests", "rate", 1_000_000),
    ]
)
steps = st.sampled_from([0, 0, 1, 900_000, 5_000_000, TTL_US, MINUTE_US + 1_000_000, DAY_US, REMEMBERED_US])
units = st.integers(0, 60)


@st.composite
def updates(draw) -> dict[str, Any]:
    """What one holder says; the numbers come when it is known how far the holder is."""
    said = draw(st.lists(counters, max_size=4, unique_by=lambda counter: counter.key))
    index = st.integers(0, len(said) - 1) if said else st.nothing()
    line = st.tuples(index, units)
    starts = st.sampled_from([0, 0, *MONEY.periods, NOON_US, NOON_US - MINUTE_US])
    return {
        "holder": draw(st.sampled_from("abc")),
        "skips": draw(st.sampled_from([0] * 8 + [-1, 1])),
        "counters": tuple(said),
        "posts": tuple(draw(st.lists(st.tuples(index, starts, st.integers(-20, 60)), max_size=3)))
        if said
        else (),
        "releases": tuple(draw(st.lists(line, max_size=2))) if said else (),
        "claims": tuple(draw(st.lists(line, max_size=1))) if said else (),
        "groups": tuple(map(tuple, draw(st.lists(st.lists(line, min_size=1, max_size=3), max_size=4))))
        if said
        else (),
        "wants": tuple(draw(st.lists(line, max_size=2))) if said else (),
        "is_last": draw(st.sampled_from([False] * 9 + [True])),
    }


@pytest.mark.parametrize("kind", ["sqlite", "alone"])
@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)
@given(said=st.lists(st.tuples(steps, updates()), min_size=1, max_size=25))
def test_every_store_says_what_the_meaning_says(request, kind, tmp_path_factory, said) -> None:
    clock, loop = Clock(), asyncio.new_event_loop()
    if kind == "alone":
        store: LimitStore = a_redis_store(request.getfixturevalue(kind), clock, loop)
    else:
        store = a_sqlite_store(tmp_path_factory.mktemp("limits"), clock)
    model = Model(clock)
    try:
        for step_us, fields in said:
            clock.now_us += step_us
            skips, holder = fields.pop("skips"), fields["holder"]
            known = model.holders.get(holder)
            fields["number"] = max(1, (known.number + 1 if known is not None else 1) + skips)
            update = Update(ttl_us=TTL_US, **fields)
            expected = loop.run_until_complete(model.update(update))
            assert loop.run_until_complete(store.update(update)) == expected
            assert (
                loop.run_until_complete(store.read(update.counters))[1]
                == loop.run_until_complete(model.read(update.counters))[1]
            )
    finally:
        loop.run_until_complete(store.close())
        loop.close()
