"""The class of a request is what a real engine schedules by: one that runs a single sequence at a time."""

import threading
import time
import urllib.request
from collections.abc import Iterator

import openai
import pytest

from tests.engine.pools import a_pool, ready
from tests.support.gateway_process import KEY, Gateway

pytestmark = pytest.mark.engine
BULK_KEY, INTERACTIVE_KEY = "sk-test-bulk-7d02b4e1", "sk-test-inter-93ac51f8"
TOKENS = 50  # of an answer that the other one waits for


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    keys = [
        {"name": "bulk", "key": BULK_KEY, "priority": "bulk"},
        {"name": "interactive", "key": INTERACTIVE_KEY, "priority": "interactive"},
    ]
    pools = {"gpu": a_pool("tiny", max_num_seqs=1, kv_cache_memory_bytes=64 << 20)}
    models = {"tiny": {"targets": [{"pool": "gpu"}], "price": {"input": 1.0, "output": 1.0}}}
    with Gateway(tmp_path_factory.mktemp("gateway"), pools=pools, models=models, keys=keys) as running:
        ready(running, "gpu/0")
        yield running


class Asked(threading.Thread):
    """A streamed request; `first_at` is when its answer began."""

    def __init__(self, gateway: Gateway, key: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self.first_at = 0.0
        self.failure: Exception | None = None
        self.is_enough = threading.Event()
        self._client = openai.OpenAI(base_url=gateway.base_url, api_key=key, max_retries=0, timeout=300)
        self._tokens = tokens
        self.start()

    def run(self) -> None:
        # The client's own word would put the bulk request first.
        more = {"priority": -1000, "ignore_eos": True}
        try:
            stream = self._client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "go on"}],
                max_tokens=self._tokens,
                stream=True,
                extra_body=more,
            )
            for _ in stream:
                self.first_at = self.first_at or time.monotonic()
                if self.is_enough.is_set():
                    stream.close()
                    return
        except Exception as error:
            self.failure = error


def waiting(gateway: Gateway, name: str) -> int:
    (pool,) = gateway.manage("/api/engines")["pools"]
    port = pool["replicas"][0]["port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith(f"vllm:{name}{{"))


def until(gateway: Gateway, name: str, count: int) -> None:
    deadline = time.monotonic() + 120
    while waiting(gateway, name) != count:
        assert time.monotonic() < deadline, f"{name} is not {count}"
        time.sleep(0.02)


def test_of_two_that_wait_in_an_engine_the_interactive_one_goes_first(gateway):
    running = Asked(gateway, KEY, 3500)
    until(gateway, "num_requests_running", 1)
    bulk = Asked(
        gateway, BULK_KEY, TOKENS
    )  # both before the gateway sees that one waits, and keeps the other
    interactive = Asked(gateway, INTERACTIVE_KEY, TOKENS)
    until(gateway, "num_requests_waiting", 2)
    running.is_enough.set()  # its place is free
    for asked in (running, bulk, interactive):
        asked.join(timeout=300)
        assert not asked.is_alive()
        assert asked.failure is None, asked.failure
    assert running.first_at < interactive.first_at < bulk.first_at
