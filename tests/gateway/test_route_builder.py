import pytest

from gateway.catalog import CatalogBuilder, Upstreams
from gateway.config import Config, load
from gateway.route_builder import routing_notes, rules_of
from policies.prices import PriceBook
from policies.routing import Catalog

CONFIG = """
pools:
  own: {endpoints: ["http://a.test:1/v1"]}
  away: {endpoints: ["http://b.test:1/v1"], enabled: false}
models:
  plain: {targets: [{pool: own}]}
  shared:
    targets: [{pool: own, model: a, weight: 3}, {pool: away, weight: 5}, {pool: own, model: b, weight: 1}, {pool: own, model: c}]
    aliases: [both]
    split_by: request
    context_tokens: 1000
    fallbacks: [{model: simple}, {model: gone}, {model: plain, failures: [context], grants: true}]
    shadows: [{model: plain, percent: 2, max_in_flight: 7}, {model: gone}]
  simple: {targets: [{pool: own}], aliases: [easy]}
  gone: {targets: [{pool: away}], fallbacks: [{model: plain}]}
rules:
  - {name: a, keys: [ci], model: easy}
  - {name: b, model: gone, when: stream}
  - {name: c}
"""


@pytest.fixture
def build(tmp_path):
    def built(text: str) -> tuple[Config, Catalog]:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        config = load(path, {})
        pools = Upstreams().pools(config.enabled_pools().values())
        return config, CatalogBuilder(config, pools, PriceBook(), 0).catalog()

    return built


async def test_a_configuration_without_any_of_it_makes_no_policy(build):
    config, catalog = build(CONFIG.partition("models:")[0] + "models: {plain: {targets: [{pool: own}]}}")
    assert rules_of(config, catalog, {}) is None
    assert catalog.find("plain").routing is None


async def test_a_model_and_its_aliases_share_one_routing(build):
    config, catalog = build(CONFIG)
    rules_of(config, catalog, {})
    routing = catalog.find("shared").routing
    assert catalog.find("both").routing is routing
    assert (routing.context_tokens, routing.split.by) == (1000, "request")
    assert catalog.find("plain").routing is None


async def test_shares_are_of_the_targets_that_are_on(build):
    config, catalog = build(CONFIG)
    rules_of(config, catalog, {})
    split = catalog.find("shared").routing.split
    assert split.shares() == {"own/a": 0.75, "own/b": 0.25}
    assert {split.draw(key)[-1].upstream_model for key in range(50)} == {"c"}


async def test_fallbacks_and_shadows_to_what_is_not_served_are_passed_over(build):
    config, catalog = build(CONFIG)
    rules_of(config, catalog, {})
    routing = catalog.find("shared").routing
    assert [(f.model.name, f.grants) for f in routing.fallbacks] == [("simple", False), ("plain", True)]
    assert routing.fallbacks[0].failures == {"error", "timeout", "rate_limit", "overload"}
    assert routing.fallbacks[0].model is catalog.find("simple")
    assert [(s.model.name, s.percent, s.max_in_flight) for s in routing.shadows] == [("plain", 2, 7)]


async def test_what_is_passed_over_is_told(build):
    config, catalog = build(CONFIG)
    assert routing_notes(config, catalog) == [
        "rules[0].keys: no key here is named ci; one made with `headgate keys create` may be",
        "rules[1]: passed over (gone is not served)",
        "models.shared.fallbacks[1]: passed over (gone is not served)",
        "models.shared.shadows[1]: passed over (gone is not served)",
    ]


async def test_weights_of_targets_that_are_off_leave_nothing_to_share(build):
    config, catalog = build(CONFIG.replace("weight: 3", "weight: 0").replace("weight: 1", "weight: 0"))
    rules_of(config, catalog, {})
    assert catalog.find("shared").routing.split is None


async def test_where_unpriced_models_are_refused_nobody_falls_to_one(build):
    config, catalog = build(
        CONFIG + "prices: {unknown: block, overrides: {own/simple: {input: 1, output: 1}}}\n"
    )
    rules_of(config, catalog, {})
    routing = catalog.find("shared").routing
    assert [fallback.model.name for fallback in routing.fallbacks] == ["simple"]
    assert routing.shadows == ()
    why = "passed over (plain has no price, and prices.unknown is block)"
    notes = routing_notes(config, catalog)
    assert f"models.shared.fallbacks[2]: {why}" in notes
    assert f"models.shared.shadows[0]: {why}" in notes
