"""Shares of recent requests: what counts, how it fades, and what a session does about it."""

import pytest

from backends.load import EndpointLoad
from policies.placement.ask import Ask
from policies.placement.recent_share import RecentShare
from policies.placement.rendezvous import order
from policies.placement.session_policy import SessionPlacer

FLOOR = 4


def endpoints(count, **given):
    return [EndpointLoad(f"pool/{n}", f"http://10.0.0.{n}/v1".encode(), **given) for n in range(count)]


def test_a_share_of_one_is_what_the_weight_says():
    heavy, light = EndpointLoad("a", b"a", weight=3.0), EndpointLoad("b", b"b")
    recent = RecentShare(FLOOR)
    recent.keep([heavy, light])
    for _ in range(30):
        recent.add(heavy, 0.0)
    for _ in range(10):
        recent.add(light, 0.0)
    assert recent.of_each([heavy, light], 0.0) == pytest.approx([1.0, 1.0])
    assert recent.of(heavy, [heavy, light], 0.0) == pytest.approx(1.0)


def test_of_a_few_requests_nothing_is_concluded():
    one, other = endpoints(2)
    recent = RecentShare(FLOOR)
    recent.keep([one, other])
    for _ in range(FLOOR - 1):
        recent.add(one, 0.0)
    assert recent.of(one, [one, other], 0.0) == 0.0
    recent.add(one, 0.0)
    assert recent.of(one, [one, other], 0.0) == pytest.approx(2.0)


def test_requests_fade_and_years_do_not_overflow():
    one, other = endpoints(2)
    recent = RecentShare(FLOOR)
    recent.keep([one, other])
    for _ in range(1000):
        recent.add(one, 0.0)
    for second in range(3600):
        recent.add(other, float(second))
    assert recent.of(one, [one, other], 3600.0) == 0.0
    for year in (1, 30):
        now = year * 365.25 * 86_400.0
        for _ in range(8):
            recent.add(one, now)
        assert recent.of(one, [one, other], now) == pytest.approx(2.0)


def test_among_some_of_the_pool_the_share_is_theirs():
    pool = endpoints(4)
    recent = RecentShare(FLOOR)
    recent.keep(pool)
    for endpoint in pool:
        for _ in range(10):
            recent.add(endpoint, 0.0)
    assert recent.of(pool[0], pool[:2], 0.0) == pytest.approx(1.0)


def test_an_endpoint_that_left_the_pool_is_forgotten():
    one, other = endpoints(2)
    recent = RecentShare(FLOOR)
    recent.keep([one, other])
    for _ in range(8):
        recent.add(one, 0.0)
        recent.add(other, 0.0)
    recent.keep([one])
    recent.add(other, 0.0)
    assert recent.of(one, [one], 0.0) == pytest.approx(1.0)


def homes(pool, count):
    """Sessions whose home is the pool's first."""
    return [s for s in range(1, 100_000) if order(pool, s)[0] is pool[0]][:count]


def play(placer, pool, session, now, times=1):
    for _ in range(times):
        chosen = placer.rank(pool, pool, Ask(session=session, prompt_tokens=1000), now).endpoints[0]
        placer.dispatched(chosen, Ask(session=session, prompt_tokens=1000), now)
    return chosen


def test_a_crowded_home_keeps_its_sessions_and_takes_no_new_ones():
    pool = endpoints(4)
    placer = SessionPlacer(1000, 1.25, FLOOR)
    resident, newcomer = homes(pool, 2)
    others = [s for s in range(1, 10_000) if order(pool, s)[0] is not pool[0]][:30]
    for other in others:
        play(placer, pool, other, 0.0)
    play(placer, pool, resident, 0.0, times=11)  # 11 of 41: more than a quarter, less than 1.25 of it
    assert play(placer, pool, resident, 0.0) is pool[0]
    assert play(placer, pool, newcomer, 0.0) is order(pool, newcomer)[1]


def test_a_session_that_is_away_stays_until_home_has_room_to_spare():
    pool = endpoints(4)
    placer = SessionPlacer(1000, 1.25, FLOOR)
    resident, newcomer = homes(pool, 2)
    others = [s for s in range(1, 10_000) if order(pool, s)[0] is not pool[0]][:36]
    for other in others:
        play(placer, pool, other, 0.0)
    play(placer, pool, resident, 0.0, times=14)
    away = play(placer, pool, newcomer, 0.0)
    assert away is not pool[0]
    assert play(placer, pool, newcomer, 1.0) is away
    # The resident is silent: what home got fades against what the others get.
    for second in range(2, 60):
        for other in others[:12]:
            play(placer, pool, other, float(second))
    assert play(placer, pool, newcomer, 60.0) is pool[0]
