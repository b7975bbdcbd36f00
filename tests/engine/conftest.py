"""A gateway that runs two engines that chat and one that embeds: real vLLM on the CPU, once per session."""

from collections.abc import Iterator

import anthropic
import openai
import pytest

from tests.engine.pools import STAYS_DEAD, Engine, a_pool, session_at, supervised
from tests.support.engine_pool import EnginePool
from tests.support.gateway_process import KEY

PRICE = {"input": 1.0, "cached_input": 0.1, "output": 4.0}  # USD per million tokens
ENGINE_KEY = "engine-test-4b7e90d2c6a1"
OTHER_KEY, BULK_KEY, INTERACTIVE_KEY = (
    "sk-test-other-2f8d6c",
    "sk-test-bulk-7d02b4e1",
    "sk-test-inter-93ac51f8",
)
KEYS = [
    {"name": "other", "key": OTHER_KEY, "team": "others"},
    {"name": "bulk", "key": BULK_KEY, "priority": "bulk"},
    {"name": "interactive", "key": INTERACTIVE_KEY, "priority": "interactive"},
]
CHAT = a_pool(
    "tiny",
    replicas=2,
    max_model_len=16384,
    max_num_seqs=4,
    max_num_queued_reqs=6,  # four run and two wait: a seventh is refused
    tool_parser="hermes",
    # A random model would fill its answer with the white space that JSON allows.
    extra_args=["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'],
    supervision=STAYS_DEAD | {"look_every_s": 1.0, "hang_timeout_s": 40.0},
)
EMBED = a_pool("tiny-embed", name="tiny-embed", runner="pooling", max_model_len=512)
MODELS = {
    "tiny": {"targets": [{"pool": "gpu", "model": "tiny"}], "price": PRICE},
    "org/tiny-embed": {"targets": [{"pool": "vectors", "model": "tiny-embed"}], "price": {"input": 0.02}},
    "misnamed": {"targets": [{"pool": "gpu", "model": "unknown-to-the-engine"}], "price": PRICE},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What kills an engine comes last."""
    items.sort(key=lambda item: item.path.name == "test_killed_engine.py")


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePool]:
    """Its engines start side by side: most of it is importing, each in processes of its own."""
    running = EnginePool(
        tmp_path_factory.mktemp("gateway"),
        CHAT["vllm"],
        workers=1,
        more_pools={"vectors": EMBED},
        models=MODELS,
        keys=KEYS,
        queue={"enabled": True},
        overload={"default": {"wait_s": 2.0}},
        server={
            "limits": {"write_stall_s": 3600.0}
        },  # nobody reads streams that are there to keep an engine busy
    )
    # A key of the pool's own lets a test ask an engine itself. Sessions stay at home, however many requests that makes
    # of one replica, however slow that makes it, and though it said a moment ago that it was full.
    running.config["pools"]["gpu"] |= {
        "api_key": ENGINE_KEY,
        "placement": {"bounded_load": 16},
        "health": {"failures": 0, "slow_factor": 0, "stall_s": 0},
    }
    with supervised(running, "gpu/0", "gpu/1", "vectors/0"):
        yield running
    assert "Traceback" not in running.log(), running.log()[-8000:]


@pytest.fixture(scope="session")
def replicas(gateway: EnginePool) -> list[Engine]:
    """Those that chat, in the order of the pool."""
    return [Engine(gateway, name) for name in ("gpu/0", "gpu/1")]


@pytest.fixture(scope="session")
def client(gateway: EnginePool) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.base_url, api_key=KEY, max_retries=0, timeout=600) as sdk:
        yield sdk


@pytest.fixture(scope="session")
def claude(gateway: EnginePool) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key=KEY, max_retries=0, timeout=600) as sdk:
        yield sdk


@pytest.fixture
async def async_client(gateway: EnginePool):
    async with openai.AsyncOpenAI(base_url=gateway.base_url, api_key=KEY, max_retries=0, timeout=600) as sdk:
        yield sdk


@pytest.fixture(scope="session")
def sessions(client: openai.OpenAI, gateway: EnginePool) -> list[str]:
    """A session for each replica, in their order."""
    return [session_at(gateway, client, endpoint) for endpoint in ("gpu/0", "gpu/1")]
