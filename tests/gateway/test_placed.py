"""Members of pools on their way to the workers: named, opened, closed, counted."""

import time

from pydantic import SecretStr

from backends.config import PoolConfig
from backends.member import Member
from gateway.catalog import Upstreams
from gateway.config import Config
from gateway.control import Membership
from gateway.health_watch import HealthWatch
from gateway.placed import PlacedConfig, PlacedPool
from policies.placement.hold import Hold

URL = "http://127.0.0.1:18000/v1"


def a_config(**pool) -> Config:
    return Config(pools={"gpu": PoolConfig(**{"endpoints": ("http://10.0.0.1:1/v1",), **pool})})


def placed(*members: Member, config: Config | None = None) -> PlacedConfig:
    pools = {"gpu": PlacedPool(members=members), "gone": PlacedPool(members=())}
    return PlacedConfig.from_json(PlacedConfig.of(config or a_config(), pools).to_json())


def test_members_reach_a_worker_with_their_keys_and_replace_what_the_configuration_says():
    config = placed(
        Member(name="gpu/0", base_url=URL, api_key=SecretStr("k0")), Member(name="gpu/1", base_url=URL[:-3])
    )
    assert list(config.placed) == ["gpu"]
    endpoints = Upstreams().pools(config.enabled_pools().values())["gpu"].endpoints
    assert [(endpoint.name, endpoint.api_key) for endpoint in endpoints] == [("gpu/0", "k0"), ("gpu/1", None)]
    assert "k0" not in repr(config)


def test_sessions_are_hashed_with_the_name_so_that_they_follow_it_to_another_address():
    upstreams = Upstreams()
    hashes = [
        upstreams.pools(placed(Member(name="gpu/0", base_url=url)).enabled_pools().values())["gpu"]
        .endpoints[0]
        .hash_key
        for url in (URL, "http://127.0.0.1:19999/v1")
    ]
    assert hashes == [b"gpu/0", b"gpu/0"]


def test_opening_and_closing_keeps_the_endpoint_and_another_key_or_address_makes_another():
    upstreams = Upstreams()

    def endpoint_of(member: Member):
        return upstreams.pools(placed(member).enabled_pools().values())["gpu"].endpoints[0]

    first = endpoint_of(Member(name="gpu/0", base_url=URL, api_key=SecretStr("k")))
    closed = endpoint_of(Member(name="gpu/0", base_url=URL, api_key=SecretStr("k"), is_open=False))
    assert closed is first
    assert closed.is_draining
    assert endpoint_of(Member(name="gpu/0", base_url=URL, api_key=SecretStr("k"))).is_draining is False
    assert endpoint_of(Member(name="gpu/0", base_url=URL, api_key=SecretStr("other"))) is not first


def test_requests_at_an_endpoint_that_a_reload_has_replaced_are_counted_until_they_end():
    upstreams = Upstreams()
    (old,) = upstreams.pools(placed(Member(name="gpu/0", base_url=URL)).enabled_pools().values())[
        "gpu"
    ].endpoints
    holds = [Hold(old, 0), Hold(old, 0)]
    changed = a_config(deadlines={"idle_s": 7})
    pools = upstreams.pools(
        placed(Member(name="gpu/0", base_url=URL), config=changed).enabled_pools().values()
    )
    holds.append(Hold(pools["gpu"].endpoints[0], 0))
    assert upstreams.in_flight(["gpu/0"]) == 3
    assert upstreams.in_flight(["gpu/1"]) == 0
    upstreams.pools([])
    assert upstreams.in_flight(["gpu/0"]) == 3
    for hold in holds:
        hold.release()
    assert upstreams.in_flight(["gpu/0"]) == 0


def test_a_word_closes_an_endpoint_and_opening_it_forgives_what_its_last_process_did():
    watch = HealthWatch()
    told = []
    watch.attach(told.append)
    settings = list(placed(Member(name="gpu/0", base_url=URL)).enabled_pools().values())
    pools = Upstreams().pools(settings)
    watch.declare(pools, settings)
    (endpoint,) = pools["gpu"].endpoints
    health = watch.book.of(endpoint)
    assert health is not None
    health.eject(time.perf_counter(), "connect")
    assert endpoint.health == 0.0
    watch.hear(Membership("gpu/0", is_open=False))
    assert endpoint.is_draining
    watch.hear(Membership("gpu/0", is_open=True))
    assert not endpoint.is_draining
    assert endpoint.health > 0.0
    assert health.ejections == 0
    watch.hear(Membership("gone/0", is_open=True))
