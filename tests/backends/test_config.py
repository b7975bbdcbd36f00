import pytest
from pydantic import ValidationError

from backends.config import (
    DeadlinesConfig,
    OutboundConfig,
    PoolConfig,
    PoolSettings,
    ProviderConfig,
    providers_in,
)
from backends.registry import KNOWN
from backends.transport import Deadlines

NO_PROXY = OutboundConfig()


def resolved(name: str, **settings: object) -> PoolSettings:
    config = ProviderConfig.model_validate(settings)
    assert config.off_because(name) is None
    return config.resolve(name, NO_PROXY)


def test_a_known_name_brings_its_record():
    settings = resolved("anthropic", api_key="k")
    assert settings.base_urls == ("https://api.anthropic.com",)
    assert settings.provider == KNOWN["anthropic"]
    assert settings.deadlines == Deadlines()


def test_what_is_given_replaces_the_records_and_headers_add_to_it():
    settings = resolved(
        "anthropic",
        api_key="k",
        base_url="http://127.0.0.1:1/",
        auth="bearer",
        paths={"messages": "/m"},
        drops=["metadata"],
        forwards=["X-Session-Id"],
        may_ask_usage=False,
        headers={"X-Department": "research"},
        deadlines={"idle_s": 7},
        models=["claude"],
        passthrough=True,
    )
    provider = settings.provider
    assert settings.base_urls == ("http://127.0.0.1:1",)
    assert (provider.auth, dict(provider.paths)) == ("bearer", {"messages": "/m"})
    assert provider.drops == {"metadata"}
    assert provider.forwards == {"x-session-id"}
    assert provider.headers == {"anthropic-version": "2023-06-01", "x-department": "research"}
    assert provider.may_ask_usage is False
    assert settings.deadlines == Deadlines()._replace(idle_s=7)
    assert (settings.models, settings.passthrough) == ({"claude"}, True)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("openai", {}, "no key, set OPENAI_API_KEY"),
        ("openai", {"api_key": ""}, "no key, set OPENAI_API_KEY"),
        ("openai", {"api_key": "k", "enabled": False}, "enabled is false"),
        ("openai", {"api_key": "k"}, None),
        ("ollama", {}, None),
        ("azure-openai", {"api_key": "k"}, "no address, set AZURE_OPENAI_BASE_URL"),
        ("azure-openai", {"api_key": "k", "base_url": "https://r.openai.azure.com/openai/v1"}, None),
        ("vllm", {}, "no address, set its base_url"),
        ("acme", {"type": "openai", "api_key": "k"}, None),
        ("acme", {"type": "openai", "base_url": "http://acme"}, None),
        ("acme", {"type": "openai", "base_url": "http://acme", "api_key": ""}, "no key, set its api_key"),
        ("acme", {"type": "openai"}, "no key, set its api_key"),
        ("acme", {"type": "vllm", "base_url": "http://acme/v1"}, None),
        ("acme", {"type": "vllm"}, "no address, set its base_url"),
    ],
)
def test_a_provider_is_on_when_it_has_a_key_and_an_address_or_needs_none(name, settings, reason):
    assert ProviderConfig.model_validate(settings).off_because(name) == reason


def test_a_key_from_the_environment_is_never_sent_to_an_address_of_another_name():
    environ = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://mine"}
    assert providers_in(environ) == {"openai": {"api_key": "k", "base_url": "http://mine"}}
    assert resolved("acme", type="openai", base_url="http://acme").api_key is None


@pytest.mark.parametrize(
    ("name", "settings", "prices"),
    [
        ("openai", {}, "openai"),
        ("openai", {"base_url": "http://127.0.0.1:1/v1"}, "openai"),
        ("openai", {"prices": None}, None),
        ("openai-eu", {"type": "openai"}, "openai"),
        ("openai-eu", {"type": "openai", "base_url": "https://api.openai.com/v2"}, "openai"),
        ("acme", {"type": "openai", "base_url": "https://acme/v1"}, None),
        ("acme", {"type": "openai", "base_url": "https://acme/v1", "prices": "together"}, "together"),
        ("azure-eu", {"type": "azure-openai", "base_url": "https://r.openai.azure.com/openai/v1"}, "azure"),
    ],
)
def test_public_prices_hold_for_the_providers_own_name_or_host(name, settings, prices):
    assert resolved(name, api_key="k", **settings).provider.prices == prices


@pytest.mark.parametrize(
    "url", ["https://api.moonshot.ai/anthropic", "https://api.moonshot.ai/anthropic/v1/"]
)
def test_anthropics_base_url_may_end_in_v1_or_not(url):
    settings = resolved("kimi", type="anthropic", auth="bearer", api_key="k", base_url=url)
    assert settings.base_urls[0] + settings.provider.paths["messages"] == (
        "https://api.moonshot.ai/anthropic/v1/messages"
    )


def test_openais_v1_is_kept():
    assert resolved("acme", type="openai", base_url="http://acme/v1/").base_urls == ("http://acme/v1",)


@pytest.mark.parametrize(
    ("no_proxy", "url", "is_direct"),
    [
        ([], "https://api.openai.com/v1", False),
        (["openai.com"], "https://api.openai.com/v1", True),
        ([".openai.com"], "https://api.openai.com/v1", True),
        (["*.openai.com"], "https://API.openai.com/v1", True),
        (["penai.com"], "https://api.openai.com/v1", False),
        (["*"], "https://api.openai.com/v1", True),
        (["10.0.0.0/8"], "http://10.1.2.3:8000", True),
        (["10.0.0.0/8"], "http://11.1.2.3:8000", False),
        (["::1"], "http://[::1]:8000", True),
        (["localhost"], "http://10.0.0.1", False),
        ([""], "https://api.openai.com", False),
    ],
)
def test_no_proxy_lists_hosts_domains_and_networks(no_proxy, url, is_direct):
    outbound = OutboundConfig.model_validate({"proxy": "http://user:pw@proxy:3128", "no_proxy": no_proxy})
    expected = None if is_direct else "http://user:pw@proxy:3128"
    assert outbound.proxy_for(url) == expected
    config = ProviderConfig.model_validate({"api_key": "k", "base_url": url})
    assert config.resolve("openai", outbound).proxy == expected


def test_a_provider_may_have_its_own_proxy_or_none():
    outbound = OutboundConfig.model_validate({"proxy": "http://proxy:3128"})

    def proxy(value: str) -> str | None:
        return (
            ProviderConfig.model_validate({"api_key": "k", "proxy": value}).resolve("openai", outbound).proxy
        )

    assert proxy("http://other:1") == "http://other:1"
    assert proxy("direct") is None
    assert proxy("") == "http://proxy:3128"


def test_pools_are_reached_directly_and_speak_vllm():
    config = PoolConfig.model_validate({"endpoints": ["http://10.0.0.5:8000/v1/"], "api_key": ""})
    settings = config.resolve("gpu", OutboundConfig.model_validate({"proxy": "http://proxy:3128"}))
    assert settings.base_urls == ("http://10.0.0.5:8000/v1",)
    assert (settings.proxy, settings.api_key) == (None, None)
    assert settings.provider.paths == KNOWN["vllm"].paths
    assert (settings.provider.name, settings.provider.prices) == ("gpu", None)


def test_a_pool_of_simulators_has_no_addresses_yet():
    settings = PoolConfig.model_validate({"simulator": {"replicas": 2}}).resolve("demo", NO_PROXY)
    assert settings.base_urls == ()
    assert settings.simulator is not None
    assert settings.provider.paths == KNOWN["simulator"].paths


def test_a_repr_shows_neither_keys_nor_headers_nor_proxies():
    secret = "hunter2-hunter2-hunter2"
    settings = resolved(
        "openai",
        api_key=secret,
        headers={"x-token": secret},
        proxy=f"http://u:{secret}@p:1",
        base_url="http://h",
    )
    assert secret not in repr(settings)
    assert secret not in str(settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"type": "opnai"}, 'did you mean "openai"?'),
        ({"type": "zzz"}, "there are anthropic, azure-openai"),
        ({"base_url": "https://user:pw@host"}, "must not hold a user name or password"),
        ({"base_url": "https://host/v1?key=x"}, "must not hold a query"),
        ({"base_url": "host:1"}, "must look like https://host"),
        ({"proxy": "https://proxy:1"}, "must start with http://"),
        ({"proxy": "proxy:1"}, "must look like"),
        ({"ca_file": "/nope.pem"}, "cannot be read"),
        ({"paths": {"chats": "/c"}}, 'there is no dialect "chats"; there are chat'),
        ({"paths": {"chat": "c"}}, "the path of chat must start with /"),
        ({"paths": {"chat": "/c d"}}, "must start with / and hold no blanks"),
        ({"forwards": ["Authorization"]}, "the client's authorization never leaves the gateway"),
        ({"forwards": ["cookie"]}, "never leaves the gateway"),
        ({"headers": {"Host": "x"}}, "belongs to the transport"),
        ({"headers": {"x:y": "x"}}, "not a valid header name"),
        ({"headers": {"x": "a\r\nb: c"}}, "printable ASCII on one line"),
        ({"deadlines": {"idle_s": 0}}, "greater than 0"),
        ({"models": "gpt"}, 'must be "\\*" or a list of names'),
        ({"models": [1]}, 'must be "\\*" or a list of names'),
        ({"auth": "basic"}, "'bearer', 'x-api-key', 'api-key' or 'none'"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_a_sentence(settings, told):
    with pytest.raises(ValidationError, match=told):
        ProviderConfig.model_validate(settings)


def test_deadlines_have_the_transports_defaults():
    assert DeadlinesConfig().resolve() == Deadlines()
