"""The real gateway in front of scripted upstreams, once per session; every test finds the upstreams' journals empty.

Models are named `{provider}/{what the upstream shall say}` (tests/support/catalogue.py): `acme/parallel-tools`.
"""

import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import anthropic
import openai
import pytest

from tests.support.certificates import Authority
from tests.support.gateway_process import KEY, Gateway
from tests.support.upstream_thread import BlockingUpstream, UpstreamThread

UPSTREAM_KEY = "sk-upstream-0d5b6c1e9f"
NARROW_KEY = "sk-narrow-41b2a3c4d5e6f708"  # may use two models
OLD_KEY = "sk-expired-5e6f7081a2b3c4d5"
PRICE = {"input": 2.5, "cached_input": 0.25, "cache_write": 3.125, "output": 10.0}
# Every bucket at a rate of its own, none a whole number of nano-dollars per token.
FINE_PRICE = {
    "input": "0.0375",
    "cached_input": "0.00375",
    "cache_write": "0.046875",
    "cache_write_1h": "0.0751",
    "output": "0.30003",
    "reasoning": "0.3501",
    "input_audio": "0.7007",
    "cached_input_audio": "0.0701",
    "output_audio": "1.2001",
    "tiers": [{"above": 200_000, "input": "0.0751", "output": "0.6001"}],
    "flex": 0.5,
}


class Upstreams(NamedTuple):
    main: BlockingUpstream
    spare: BlockingUpstream  # the second endpoint of the pool
    tls: BlockingUpstream


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="session")
def upstreams(authority: Authority) -> Iterator[Upstreams]:
    with UpstreamThread() as thread:
        tls = authority.server_context("DNS:localhost")
        yield Upstreams(thread.start(), thread.start(), thread.start(tls=tls))


@pytest.fixture(scope="session")
def gateway(
    upstreams: Upstreams, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    config = _config(upstreams, authority.ca_file)
    with Gateway(tmp_path_factory.mktemp("gateway"), workers=2, **config) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-8000:]


# Each test has endpoints that nobody speaks ill of, and upstreams that hear of nothing but its requests.
UNWATCHED = {"failures": 0, "retry_floor": 1000, "probe": "none", "scrape": "none"}


def _config(upstreams: Upstreams, ca_file: str) -> dict[str, Any]:
    config = _settings(upstreams, ca_file)
    for settings in (*config["providers"].values(), *config["pools"].values()):
        settings["health"] = UNWATCHED
    return config


def _settings(upstreams: Upstreams, ca_file: str) -> dict[str, Any]:
    main, spare, tls = upstreams
    stalls = {"deadlines": {"idle_s": 0.4}}
    account = {"type": "openai", "api_key": UPSTREAM_KEY}
    gpu = {"pool": "gpu"}
    return {
        "keys": [
            {"name": "narrow", "key": NARROW_KEY, "models": ["acme/plain", "org/*"], "tags": ["ci"]},
            {"name": "old", "key": OLD_KEY, "expires": "2026-01-01"},
        ],
        "providers": {
            "openai": {"api_key": UPSTREAM_KEY, "base_url": f"{main.url}/v1"},
            "anthropic": {"api_key": UPSTREAM_KEY, "base_url": main.url},
            "acme": {**account, "base_url": f"{main.url}/v1"},
            "claude": {"type": "anthropic", "api_key": UPSTREAM_KEY, "base_url": main.url},
            "picky": {
                **account,
                "base_url": f"{main.url}/picky/v1",
                "drops": ["prompt_cache_key", "safety_identifier"],
                "may_ask_usage": False,
            },
            # These give up early on a stream that stalls, on an answer that does not begin.
            "slow": {**account, "base_url": f"{main.url}/v1", **stalls},
            "slow-claude": {
                "type": "anthropic",
                "api_key": UPSTREAM_KEY,
                "base_url": main.url,
                **stalls,
            },
            "late": {**account, "base_url": f"{main.url}/v1", "deadlines": {"first_byte_s": 0.3}},
            "down": {**account, "base_url": f"http://127.0.0.1:{_closed_port()}/v1"},
            "open": {**account, "base_url": f"{main.url}/open/v1", "passthrough": True},
            "tls": {**account, "base_url": f"{tls.url}/v1", "ca_file": ca_file},
        },
        # No endpoint is ever above its share: where a session lives is its hash's word alone.
        "pools": {
            "gpu": {
                "endpoints": [f"{main.url}/v1", f"{spare.url}/v1"],
                "placement": {"bounded_load_floor": 100_000},
            }
        },
        "models": {
            "org/llama-3": {"targets": [{**gpu, "model": "llama-3"}], "aliases": ["llama"]},
            "fine": {"targets": [{"provider": "acme"}, {"provider": "claude"}], "price": FINE_PRICE},
            "sturdy": {"targets": [gpu], "price": PRICE},
            "spread": {
                "targets": [
                    {"provider": "down"},
                    {"provider": "acme", "model": "dear", "price": {"input": 100, "output": 1000}},
                ],
                "price": {"input": 1, "output": 1},
            },
            "same": {"targets": [gpu]},
        },
        "prices": {
            "overrides": dict.fromkeys(
                ("acme/*", "claude/*", "slow/*", "slow-claude/*", "open/*", "tls/*", "gpu/*"), PRICE
            )
        },
    }


def _closed_port() -> int:
    """Refuses connections, now and later: below the range the system gives out."""
    for port in range(20_001, 30_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no closed port")


@pytest.fixture(scope="module")
def due(gateway: Gateway) -> Iterator[Callable[..., None]]:
    """Notes what the row of a request must say. Rows are written a moment late, so all are looked at together, last."""
    expected: dict[str, tuple[str, dict[str, Any]]] = {}

    def note(request_id: str, **columns: Any) -> None:
        expected[request_id] = (os.environ["PYTEST_CURRENT_TEST"], columns)

    yield note
    rows = {request_id: gateway.row(request_id) for request_id in expected}
    for request_id, (test, columns) in expected.items():
        assert {name: rows[request_id][name] for name in columns} == columns, test


class _Positive:
    """Equal to any number above zero."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and other > 0

    def __repr__(self) -> str:
        return "more than 0"


POSITIVE: Any = _Positive()


@pytest.fixture(autouse=True)
def _forget(upstreams: Upstreams) -> None:
    for upstream in upstreams:
        upstream.clear()


@pytest.fixture
def upstream(upstreams: Upstreams) -> BlockingUpstream:
    return upstreams.main


@pytest.fixture(scope="session")
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.base_url, api_key=KEY, max_retries=0, timeout=60) as sdk:
        yield sdk


@pytest.fixture(scope="session")
def claude(gateway: Gateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key=KEY, max_retries=0, timeout=60) as sdk:
        yield sdk


@pytest.fixture
async def async_client(gateway: Gateway):
    async with openai.AsyncOpenAI(base_url=gateway.base_url, api_key=KEY, max_retries=0, timeout=60) as sdk:
        yield sdk


@pytest.fixture
async def async_claude(gateway: Gateway):
    async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key=KEY, max_retries=0, timeout=60) as sdk:
        yield sdk
