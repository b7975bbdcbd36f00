"""The gate in front of the queue, with figures and times of the test's own."""

import random

import pytest

from backends.load import EndpointLoad
from policies.placement.async_room import (
    AsyncLimit,
    RateReading,
    RateRoom,
    Trickle,
    idle_slots,
    is_congested,
    job_slots,
)


def endpoint(slots=0, in_flight=0, processes=1, **scraped):
    load = EndpointLoad("e", b"e", max_in_flight=slots, processes=processes)
    load.in_flight = in_flight
    if scraped:
        load.scraped_at, load.fresh_until = 1.0, scraped.pop("fresh_until", 100.0)
        load.in_flight_at_scrape = scraped.pop("ours", 0)
        for name, value in scraped.items():
            setattr(load, name, value)
    return load


@pytest.mark.parametrize(
    ("load", "reserve", "idle"),
    [
        (endpoint(slots=20, in_flight=5), 0.0, 15),
        (endpoint(slots=20, in_flight=5), 0.1, 13),
        (endpoint(slots=20, in_flight=5), 0.01, 14),  # one at least
        (endpoint(slots=1), 0.05, 1),  # but not the only one
        (endpoint(slots=20, in_flight=5, processes=3), 0.0, 2),
        (endpoint(slots=20, in_flight=20), 0.0, 0),
        (endpoint(slots=20, running=12, ours=4, in_flight=4), 0.0, 8),  # others have eight
        (endpoint(slots=20, running=12, ours=12, in_flight=2), 0.0, 18),  # ours have come back since
        (endpoint(slots=20, running=0, ours=4, in_flight=18), 0.0, 2),  # the figure was older than it seemed
        (endpoint(slots=20, running=10, processes=2), 0.0, 5),  # each takes its part
        (endpoint(slots=20, running=3, waiting=1), 0.0, 0),
        (endpoint(slots=20, running=3, waiting=1), 0.05, 15),  # it has just come: its step is the next
        (endpoint(slots=20, running=3, waiting=2), 0.05, 0),  # more than are expected: a queue
        (endpoint(slots=20, running=20, waiting=1), 0.05, 0),
        (endpoint(slots=20, kv_usage=0.8), 0.0, 0),
        (endpoint(slots=20, kv_usage=0.77), 0.05, 0),
        (endpoint(slots=20, running=1, fresh_until=5.0), 0.0, 0),  # stale: nobody knows
    ],
)
def test_idle_slots_are_what_nobody_would_wait_for(load, reserve, idle):
    assert idle_slots([load], 10.0, reserve) == idle


@pytest.mark.parametrize(("slots", "processes"), [(3, 2), (89, 8), (1, 4), (6, 3)])
def test_what_the_processes_take_together_is_what_there_is(slots, processes):
    """Rounded up in each, eight of them took 96 of the 96 slots of which seven are kept."""
    shares = []
    for place in range(processes):
        load = endpoint(slots=slots, processes=processes, running=0)
        load.place = place
        shares.append(idle_slots([load], 10.0, 0.0))
    assert sum(shares) == slots
    assert max(shares) - min(shares) <= 1


def test_jobs_that_all_went_to_one_endpoint_are_not_started_once_more_for_the_other():
    pool = [endpoint(slots=4, in_flight=3), endpoint(slots=4)]
    assert idle_slots(pool, 1.0, 0.05) == 3
    assert job_slots(pool, 0.05) == 6
    assert job_slots([endpoint(slots=4, processes=2)], 0.05) == 2
    assert job_slots([endpoint()], 0.05) > 1000


def test_an_endpoint_that_is_out_or_drains_has_none():
    out, draining, well = endpoint(slots=8), endpoint(slots=8), endpoint(slots=8)
    out.health, draining.is_draining = 0.0, True
    assert idle_slots([out, draining, well], 1.0, 0.0) == 8


def test_what_cannot_be_looked_into_is_bounded_by_the_limit_alone():
    assert idle_slots([endpoint()], 1.0, 0.05) > 1000


def test_congestion_is_believed_while_the_figures_are_fresh():
    assert is_congested([endpoint(), endpoint(waiting=1)], 10.0, 0.05)
    assert not is_congested([endpoint(waiting=1, fresh_until=5.0)], 10.0, 0.05)


def test_who_comes_between_two_steps_of_an_engine_is_no_congestion():
    assert not is_congested([endpoint(slots=96, running=80, waiting=5)], 10.0, 0.05)
    assert is_congested([endpoint(slots=96, running=80, waiting=6)], 10.0, 0.05)
    assert is_congested([endpoint(slots=96, running=96, waiting=1)], 10.0, 0.05)
    assert is_congested([endpoint(slots=96, running=80, waiting=1)], 10.0, 0.0)


def rounds(limit, count):
    """So many rounds in which all that may run does, and ends well."""
    for _ in range(count):
        for _ in range(limit.room(0, 0.0)):
            limit.succeeded(int(limit.value))
    return int(limit.value)


def test_the_limit_doubles_until_it_is_refused_and_then_grows_by_one():
    limit = AsyncLimit(256)
    assert [rounds(limit, 1) for _ in range(5)] == [2, 4, 8, 16, 32]
    limit.refused(1.0, None)
    assert limit.value == 16
    rounds(limit, 1)
    assert limit.value == pytest.approx(17, abs=0.1)
    rounds(limit, 4)
    assert limit.value == pytest.approx(21, abs=0.5)


def test_many_refusals_at_once_are_one():
    limit = AsyncLimit(256, is_bounded=True)
    for n in range(50):
        limit.refused(10.0 + n / 100, None)
    assert limit.value == 128
    limit.refused(11.5, None)
    assert limit.value == 64


def test_a_refusal_is_obeyed_for_as_long_as_it_asks():
    limit = AsyncLimit(8, is_bounded=True)
    limit.refused(10.0, 5.0)
    assert (limit.room(0, 14.9), limit.room(0, 15.1)) == (0, 4)
    assert limit.closed_for_s(12.0) == 3.0


def test_requests_that_wait_in_the_engine_take_a_tenth_off():
    limit = AsyncLimit(100, is_bounded=True)
    limit.crowded(10.0)
    assert limit.value == 90


def test_a_limit_that_is_not_used_up_does_not_grow():
    limit = AsyncLimit(256, is_bounded=True)
    limit.refused(1.0, None)
    limit.succeeded(3)
    assert limit.value == 128


def test_two_limits_that_share_a_pool_come_to_share_it_evenly():
    draw, capacity = random.Random(1), 40
    limits, now = (AsyncLimit(256), AsyncLimit(256)), 0.0
    limits[0].value = 35.0
    for limit in limits:
        limit.refused(now, None)
    for _ in range(400):
        now += 1.1
        for limit in limits:
            if sum(int(each.value) for each in limits) > capacity and draw.random() < 0.5:
                limit.refused(now, None)
            else:
                rounds(limit, 1)
    assert all(5 < limit.value < 35 for limit in limits)


def test_a_rate_closes_while_less_than_its_share_is_left_and_opens_when_it_is_back():
    room = RateRoom()
    room.read([RateReading(100, 40, 60.0)], 10.0, 0.05)
    assert room.is_open(10.0)
    room.read([RateReading(100, 100, 0.0), RateReading(1000, 10, 99.0)], 10.0, 0.05)
    assert not room.is_open(13.9)
    assert room.is_open(14.1)  # 40 of 990 come back in 4 s


def test_a_trickle_is_due_after_its_time_and_not_before():
    trickle = Trickle(30.0, 0.0)
    assert (trickle.is_due(29.0), trickle.is_due(30.0)) == (False, True)
    trickle.started(40.0)
    assert (trickle.is_due(69.0), trickle.is_due(70.0)) == (False, True)
