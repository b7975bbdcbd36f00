from pathlib import Path

import pytest

from backends.dialect import CHAT, EMBEDDINGS, MESSAGES
from gateway.catalog import CatalogBuilder, Upstreams
from gateway.config import Config, load
from policies.health.book import HealthBook
from policies.placement.place import place
from policies.prices import PriceBook
from tests.support.builders import an_exchange

YAML = """
providers:
  openai: {api_key: sk-up-1}
  anthropic: {api_key: sk-up-2, passthrough: true}
  acme: {type: openai, base_url: "http://127.0.0.1:9/v1", models: [one]}
pools:
  gpu: {endpoints: ["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"]}
models:
  mine:
    targets: [{pool: gpu, model: upstream-name}, {provider: openai, model: gpt-5}]
    price: {input: 1.5, output: 3}
    aliases: [also-mine]
prices:
  overrides:
    "acme/*": {input: 7, output: 7}
    "acme/one": {input: 9, output: 9}
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    return load(path, {})


def built(config: Config, upstreams: Upstreams | None = None):
    upstreams = upstreams or Upstreams()
    pools = upstreams.pools([*config.enabled_pools().values(), *config.enabled_providers().values()])
    builder = CatalogBuilder(config, pools, PriceBook(), 1_700_000_000)
    return builder.catalog(), builder.passthrough()


async def test_a_declared_model_has_its_targets_in_order_and_is_found_by_its_aliases(config):
    catalog, _ = built(config)
    for name in ("mine", "also-mine"):
        model = catalog.find(name)
        assert [target.name for target in model.targets] == ["gpu", "openai"]
        assert [c.endpoint.name for c in model.candidates(CHAT)] == ["gpu/0", "gpu/1", "openai"]
        assert model.targets[0].upstream_model == "upstream-name"


async def test_only_endpoints_that_speak_the_dialect_are_candidates(config):
    catalog, _ = built(config)
    assert [c.endpoint.name for c in catalog.find("mine").candidates(MESSAGES)] == ["gpu/0", "gpu/1"]
    assert catalog.find("anthropic/claude-sonnet-4-5").candidates(EMBEDDINGS) == ()


async def test_any_model_of_an_enabled_provider_is_found_under_its_name(config):
    catalog, _ = built(config)
    model = catalog.find("openai/gpt-5")
    assert model.targets[0].upstream_model == "gpt-5"
    assert model.targets[0].price.kind == "known"
    unheard_of = catalog.find("openai/made-up-yesterday")
    assert unheard_of.targets[0].price.kind == "unknown"


async def test_a_bare_name_goes_to_the_provider_whose_price_list_has_it(config):
    catalog, _ = built(config)
    assert catalog.find("gpt-5").targets[0].name == "openai"
    assert catalog.find("claude-sonnet-4-5").targets[0].name == "anthropic"
    assert catalog.find("nobody-has-this") is None


async def test_a_provider_with_a_list_of_models_serves_no_others(config):
    catalog, _ = built(config)
    assert catalog.find("acme/one") is not None
    assert catalog.find("acme/two") is None


async def test_a_provider_that_is_off_serves_nothing(config):
    catalog, _ = built(config)
    assert catalog.find("groq/llama-3.3-70b-versatile") is None


async def test_the_models_own_price_is_used_and_the_longest_override_wins(config):
    catalog, _ = built(config)
    own = catalog.find("mine").targets[0].price
    assert (own.kind, own.source) == ("known", "config")
    assert own.card.rates(10, "", 0.0).input == 1_500_000_000
    assert catalog.find("acme/one").targets[0].price.card.rates(10, "", 0.0).input == 9_000_000_000


async def test_only_providers_opened_for_it_can_be_passed_through(config):
    _, passthrough = built(config)
    assert list(passthrough) == ["anthropic"]


async def test_the_list_shows_declared_models_and_what_providers_are_known_to_have(config):
    catalog, _ = built(config)
    names = [model.name for model in catalog.models()]
    assert names == sorted(names)
    assert {"mine", "also-mine", "openai/gpt-5"} <= set(names)


async def test_a_reload_keeps_the_connections_and_the_load_of_what_did_not_change(config, tmp_path):
    upstreams = Upstreams()
    built(config, upstreams)
    before = {endpoint.name: endpoint for endpoint in upstreams.endpoints()}
    before["gpu/0"].in_flight = 3
    first = before["gpu/0"]
    path = tmp_path / "config.yaml"
    path.write_text(
        YAML.replace("sk-up-1", "sk-up-9").replace("http://127.0.0.1:2/v1", "http://127.0.0.1:3/v1")
    )
    catalog, _ = built(load(path, {}), upstreams)
    after = {endpoint.name: endpoint for endpoint in upstreams.endpoints()}
    assert after["anthropic"] is before["anthropic"]
    assert after["openai"] is not before["openai"]
    assert after["openai"].api_key == "sk-up-9"
    endpoints = [c.endpoint for c in catalog.find("mine").candidates(MESSAGES)]
    assert [endpoint.connections.origin.port for endpoint in endpoints] == [1, 3]
    assert endpoints[0] is first
    assert first.in_flight == 3


async def test_a_session_keeps_its_home_when_the_pools_list_is_reordered(config, tmp_path):
    upstreams = Upstreams()
    path = tmp_path / "config.yaml"
    homes = []
    for text in (YAML, YAML.replace("1/v1", "x/v1").replace("2/v1", "1/v1").replace("x/v1", "2/v1")):
        path.write_text(text)
        model = built(load(path, {}), upstreams)[0].find("mine")
        (choice,) = place(an_exchange(MESSAGES, model=model, session_hash=77), HealthBook(), 0.0)
        homes.append(choice.candidates[0].endpoint.connections.origin.port)
    assert homes[0] == homes[1]


async def test_names_made_up_by_clients_do_not_pile_up(config):
    catalog, _ = built(config)
    for n in range(3000):
        assert catalog.find(f"openai/made-up-{n}") is not None
    resolve = catalog._resolve.__self__
    assert len(resolve._resolved) <= 1024
