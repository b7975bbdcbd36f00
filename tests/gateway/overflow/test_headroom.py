"""How many jobs of a lane may start: several pools, waiters, accounts' rates, a trickle. Figures and time are the test's."""

from types import SimpleNamespace

import pytest

from backends.load import EndpointLoad
from gateway.overflow.config import QueueConfig
from gateway.overflow.headroom import Headroom, Load, readings, span_s
from policies.health.book import HealthBook
from policies.placement import async_room

IDLE = Load({}, {})


@pytest.fixture
def at_once(monkeypatch):
    """A pool may be filled in no time."""
    monkeypatch.setattr(async_room, "RAMP_S", 1e-6)


class Service:
    """One model with targets in this order."""

    def __init__(self, *pools, reserve=0.0, trickle_s=30.0, processes=1):
        self.waiting = {}
        self.pools = {
            name: SimpleNamespace(
                name=name, endpoints=(EndpointLoad(name, name.encode(), max_in_flight=slots),)
            )
            for name, slots in pools
        }
        targets = tuple(SimpleNamespace(pool=pool) for pool in self.pools.values())
        model = SimpleNamespace(name="m", targets=targets)
        catalog = SimpleNamespace(find=lambda name: model if name == "m" else None)
        self.runtime = SimpleNamespace(catalog=catalog, health=HealthBook())
        settings = QueueConfig(reserve=reserve, trickle_s=trickle_s)
        self.wanted = []
        self.headroom = Headroom(lambda: settings, lambda: self.waiting, processes, self.wanted.append)

    def room(self, now=1.0, load=IDLE, lane="m"):
        self.headroom.room(lane, load, self.runtime, now - 0.1)
        return self.headroom.room(lane, load, self.runtime, now)

    def endpoint(self, pool):
        return self.pools[pool].endpoints[0]


def test_room_is_what_is_idle_less_what_is_on_its_way(at_once):
    service = Service(("a", 10))
    assert service.room().slots == 10
    service.endpoint("a").in_flight = 3
    assert service.room(load=Load({"a": 5}, {"a": 2})).slots == 5


def test_interactive_requests_that_wait_close_the_pool_at_once(at_once):
    service = Service(("a", 10))
    service.waiting = {"a": 1}
    assert service.room() is None
    service.waiting = {"a": 0, "b": 3}
    assert service.room().slots == 10


def test_a_full_target_leaves_it_to_the_next(at_once):
    service = Service(("a", 4), ("b", 4))
    service.endpoint("a").in_flight = 4
    assert service.room().pool == "b"


def test_a_pool_whose_engines_sleep_is_wanted_and_its_next_target_takes_the_job(at_once):
    service = Service(("a", 4), ("b", 4), trickle_s=1)
    service.endpoint("a").is_draining = True
    assert service.room(50.0).pool == "b"
    assert set(service.wanted) == {"a"}
    service.wanted.clear()
    service.endpoint("b").is_draining = True
    assert service.room(100.0) is None  # not even a trickle's: it could only wait for them in memory
    assert set(service.wanted) == {"a", "b"}
    service.wanted.clear()
    service.endpoint("a").is_draining = False
    assert service.room(101.0).pool == "a"
    assert not service.wanted


def test_an_empty_pool_is_filled_bit_by_bit_and_what_ends_is_replaced_at_once():
    service = Service(("a", 100))
    running, starts = 0, []
    for tick in range(45):
        room = service.headroom.room("m", Load({"a": running}, {"a": 0}), service.runtime, tick * 0.05)
        starts.append(room.slots if room is not None else 0)
        running += starts[-1]
        service.endpoint("a").in_flight = running
    assert (max(starts) <= 4, running) == (True, 100)
    service.endpoint("a").in_flight = 99
    assert service.headroom.room("m", Load({"a": 99}, {}), service.runtime, 2.25).slots == 1


def test_a_pool_whose_slots_are_not_known_begins_with_one(at_once):
    assert Service(("a", 0)).room().slots == 1


def test_a_job_of_a_model_that_is_no_longer_served_is_run_to_learn_it():
    assert Service(("a", 4)).room(lane="gone") == (1, "", False)


def test_however_busy_a_pool_is_one_starts_now_and_then(at_once):
    service = Service(("a", 4), trickle_s=30, processes=2)
    service.endpoint("a").in_flight = 4
    assert service.room(1.0) is None
    assert service.room(50.0) is None
    assert service.room(62.0) == (1, "a", True)
    service.headroom.started("a", 62.0)
    assert service.room(63.0) is None


def test_an_account_is_left_alone_for_as_long_as_it_asks_trickle_or_not(at_once):
    service = Service(("a", 0), trickle_s=1)
    service.headroom.refused("a", 30.0, (), 10.0)
    assert service.room(39.0) is None
    assert service.room(41.0) is not None


def test_an_accounts_rates_keep_a_share_for_others(at_once):
    service = Service(("a", 0), reserve=0.1)
    low = [
        (b"x-ratelimit-limit-requests", b"100"),
        (b"x-ratelimit-remaining-requests", b"5"),
        (b"x-ratelimit-reset-requests", b"19s"),
    ]
    service.headroom.answered("a", 1, low, 10.0)
    assert service.room(10.5) is None
    assert service.room(11.5).slots > 0


def test_rates_are_read_in_both_families_words():
    found = readings(
        [
            (b"x-ratelimit-limit-tokens", b"1000"),
            (b"x-ratelimit-remaining-tokens", b"900"),
            (b"x-ratelimit-reset-tokens", b"6m0s"),
            (b"anthropic-ratelimit-input-tokens-limit", b"50"),
            (b"anthropic-ratelimit-input-tokens-remaining", b"7"),
            (b"x-ratelimit-remaining-requests", b"3"),
            (b"content-type", b"application/json"),
        ]
    )
    assert {(each.limit, each.remaining) for each in found} == {(50, 7), (1000, 900)}
    assert {each.resets_in_s for each in found} == {1.0, 360.0}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120ms", 0.12),
        ("8.64s", 8.64),
        ("6m0s", 360),
        ("1h2m3s", 3723),
        ("7", 7),
        ("", 1),
        ("soon", 1),
        ("1.2.3s", 1),
    ],
)
def test_spans_are_read_as_providers_write_them(text, seconds):
    assert span_s(text) == pytest.approx(seconds)
