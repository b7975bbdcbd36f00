import time

import pytest

from backends.config import OutboundConfig, PoolConfig, ProviderConfig
from backends.health_config import HealthConfig
from backends.pool import Pool
from backends.registry import KNOWN
from gateway.control import EndpointState, Probed, Scraped
from gateway.health_watch import HealthWatch, health_settings, probe_of, scrape_of
from policies.health.settings import HealthSettings
from tests.support.builders import an_endpoint


def a_watch(names: tuple[str, ...] = ("gpu/0", "gpu/1")) -> tuple[HealthWatch, list[EndpointState]]:
    told: list[EndpointState] = []
    watch = HealthWatch()
    watch.attach(told.append)
    settings = PoolConfig(endpoints=tuple(f"http://127.0.0.1:{9 + n}/v1" for n in range(len(names)))).resolve(
        "gpu", OutboundConfig()
    )
    watch.declare({"gpu": Pool("gpu", tuple(map(an_endpoint, names)))}, [settings])
    return watch, told


def fail(watch: HealthWatch, name: str) -> None:
    now = time.perf_counter()
    watch.book.find(name).attempt(now, 1.0).failed(now, "connect")


def test_what_a_worker_finds_out_is_told_counted_and_shown():
    watch, told = a_watch()
    fail(watch, "gpu/0")
    assert told == [EndpointState("gpu/0", "out", "connect", 10.0)]
    assert watch.ejections == {("gpu/0", "connect"): 1}
    assert watch.shares() == {"gpu/0": 0.0, "gpu/1": 1.0}


def test_what_it_hears_is_believed_and_told_but_not_counted():
    watch, told = a_watch()
    watch.hear(EndpointState("gpu/1", "out", "500", 10.0))
    watch.hear(EndpointState("gpu/1", "out", "500", 10.0))
    assert [(word.endpoint, word.state) for word in told] == [("gpu/1", "out")]
    assert watch.ejections == {}


def test_a_pause_is_no_change_of_state():
    watch, told = a_watch()
    watch.book.find("gpu/0").cool(time.perf_counter(), 5.0)
    assert told == []


def test_scraped_figures_reach_the_endpoint_and_are_fresh_for_their_time():
    watch, _ = a_watch()
    watch.hear(Scraped("gpu/0", 3, 2, 0.5, 3.0))
    endpoint = watch.book.find("gpu/0").endpoint
    assert (endpoint.running, endpoint.waiting, endpoint.kv_usage) == (3, 2, 0.5)
    assert endpoint.fresh_until - endpoint.scraped_at == pytest.approx(3.0)


def test_a_word_about_an_endpoint_that_is_gone_is_dropped():
    watch, told = a_watch()
    for word in (EndpointState("old/0", "out"), Probed("old/0", "connect"), Scraped("old/0", 1, 1, 0.1, 1.0)):
        watch.hear(word)
    assert told == []


@pytest.mark.parametrize(
    ("kind", "probe", "scrape"),
    [("vllm", "generate", "metrics"), ("simulator", "generate", "metrics"), ("sglang", "generate", "metrics"), ("openai", "none", "none")],
)  # fmt: skip
def test_each_kind_of_upstream_is_asked_what_costs_nobody_anything(kind, probe, scrape):
    assert (probe_of(HealthConfig(), KNOWN[kind]), scrape_of(HealthConfig(), KNOWN[kind])) == (probe, scrape)
    own = HealthConfig(probe="health", scrape="load")
    assert (probe_of(own, KNOWN[kind]), scrape_of(own, KNOWN[kind])) == ("health", "load")


def test_the_policy_has_the_defaults_of_the_configuration():
    assert health_settings(HealthConfig(), KNOWN["openai"]) == HealthSettings()


def test_further_keys_that_are_empty_are_left_out():
    provider = ProviderConfig(api_key="a", more_api_keys=("", "b"))
    assert provider.resolve("openai", OutboundConfig()).more_api_keys == ("b",)
