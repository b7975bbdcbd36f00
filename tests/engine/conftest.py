"""Real vLLM on the CPU (two replicas that chat, one that embeds) and a gateway in front of them, once per session."""

from collections.abc import Iterator
from typing import NamedTuple

import anthropic
import openai
import pytest

from tests.engine.calls import ask
from tests.engine.vllm_process import Vllm
from tests.support.gateway_process import KEY, Gateway

PRICE = {"input": 1.0, "cached_input": 0.1, "output": 4.0}  # USD per million tokens
CHAT_ARGUMENTS = (
    *("--max-model-len", "4096", "--block-size", "32", "--enable-prompt-tokens-details"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--max-num-seqs", "4", "--max-num-queued-reqs", "6"),  # four run and two wait: a seventh is refused
    # A random model would fill its answer with the white space that JSON allows.
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)


class Engines(NamedTuple):
    chat: list[Vllm]
    embed: Vllm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What kills an engine comes last."""
    items.sort(key=lambda item: item.path.name == "test_killed_engine.py")


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Started side by side: most of it is importing, each in processes of its own."""
    logs = tmp_path_factory.mktemp("vllm")
    started: list[Vllm] = []
    try:
        started += (Vllm("tiny", logs / f"{n}.log", *CHAT_ARGUMENTS) for n in range(2))
        started.append(Vllm("tiny-embed", logs / "embed.log", "--runner", "pooling"))
        for engine in started:
            engine.wait_ready()
        yield Engines(started[:2], started[2])
    finally:
        for engine in started:
            engine.kill()


@pytest.fixture(scope="session")
def replicas(engines: Engines) -> list[Vllm]:
    """In the order of the pool: the endpoint of the first is `gpu/0`."""
    return engines.chat


@pytest.fixture(scope="session")
def gateway(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    pools = {
        # Sessions stay where a test put them, however many requests that makes of one replica.
        "gpu": {
            "endpoints": [replica.base_url for replica in engines.chat],
            "placement": {"bounded_load": 16},
        },
        "vectors": {"endpoints": [engines.embed.base_url]},
    }
    models = {
        "tiny": {"targets": [{"pool": "gpu", "model": "tiny"}], "price": PRICE},
        "org/tiny-embed": {"targets": [{"pool": "vectors", "model": "tiny-embed"}], "price": {"input": 0.02}},
        "misnamed": {"targets": [{"pool": "gpu", "model": "unknown-to-the-engine"}], "price": PRICE},
    }
    with Gateway(tmp_path_factory.mktemp("gateway"), pools=pools, models=models) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-8000:]


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


@pytest.fixture(scope="session")
def sessions(client: openai.OpenAI) -> list[str]:
    """A session for each replica, in their order."""
    homes: dict[str, str] = {}
    for n in range(64):
        home = ask(client.with_raw_response, session=f"pin-{n}").headers["x-headgate-target"]
        homes.setdefault(home, f"pin-{n}")
        if len(homes) == 2:
            return [homes["gpu/0"], homes["gpu/1"]]
    raise AssertionError(f"64 sessions went to {list(homes)} only")
