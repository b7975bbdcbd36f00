"""What two real engines say of their caches: predicted cached tokens are those that vLLM then reports.

Memory that is smaller than the conversations together, so that much is forgotten. HEADGATE_PROMPTS=1000 asks that many.
"""

import asyncio
import os
import time
from collections.abc import Iterator

import pytest

from tests.engine.pools import a_pool, ready, supervised
from tests.engine.random_chats import chat
from tests.support.gateway_process import KEY, Gateway

pytestmark = pytest.mark.engine

PROMPTS = int(os.environ.get("HEADGATE_PROMPTS", "100"))
SEED = int(os.environ.get("HEADGATE_SEED", "7"))
KV_BYTES = 10_240 * 512  # tokens x bytes for each: of some conversations only


@pytest.fixture(scope="module")
def gateway(tmp_path_factory) -> Iterator[Gateway]:
    pool = a_pool(
        "tiny", replicas=2, kv_cache_memory_bytes=KV_BYTES, max_model_len=8192, tool_parser="hermes"
    )
    pool |= {"placement": {"policy": "prefix", "kv_events": True, "tokenize_timeout_s": 30}}
    models = {"tiny": {"targets": [{"pool": "gpu", "model": "tiny"}], "price": {"input": 1.0}}}
    running = Gateway(tmp_path_factory.mktemp("known"), pools={"gpu": pool}, models=models)
    with supervised(running, "gpu/0", "gpu/1"):
        yield running


def known(gateway: Gateway) -> set[str]:
    """Endpoints whose cache every word was heard of."""
    told = gateway.manage("/api/status")["endpoints"]
    return {endpoint["name"] for endpoint in told if endpoint.get("kv_events") == "complete"}


def test_predicted_cached_tokens_are_those_that_the_engine_reports(gateway, capsys):
    deadline = time.monotonic() + 60
    while known(gateway) != {"gpu/0", "gpu/1"}:
        assert time.monotonic() < deadline, gateway.manage("/api/status")["endpoints"]
        time.sleep(0.1)
    ids = asyncio.run(chat(gateway.base_url, KEY, PROMPTS, SEED))
    rows = {row["request_id"]: row for row in gateway.rows(PROMPTS, within_s=60)}
    asked = [rows[request_id] for request_id in ids]
    pairs = [(row["predicted_cached_tokens"], row["cache_read_tokens"]) for row in asked]
    equal = sum(predicted == reported for predicted, reported in pairs)
    hits = sum(reported > 0 for _, reported in pairs)
    with capsys.disabled():
        print(f"\n    seed {SEED}: {equal} of {PROMPTS} predictions equal, {hits} prompts with hits")
    assert equal >= 0.99 * PROMPTS, [pair for pair in pairs if pair[0] != pair[1]]
    assert hits > PROMPTS / 2
    metrics = gateway.metrics()
    assert metrics['headgate_cache_predictions_total{source="exact"}'] >= 0.95 * PROMPTS
    assert metrics['headgate_prompt_tokenisations_total{outcome="told"}'] >= 0.95 * PROMPTS


def test_the_engines_rates_are_told_to_operators(gateway):
    asyncio.run(chat(gateway.base_url, KEY, 5, SEED + 1))
    deadline = time.monotonic() + 30
    while True:
        seen = gateway.manage("/api/status")["endpoints"]
        rates = [endpoint.get("generation_tokens_per_s", 0) for endpoint in seen]
        if any(rates):
            break
        assert time.monotonic() < deadline, seen
        time.sleep(0.1)
    assert {endpoint["name"] for endpoint in seen} == {"gpu/0", "gpu/1"}
    assert all(endpoint["kv_blocks"] > 0 for endpoint in seen)


def test_what_an_engine_forgets_when_it_ends_is_forgotten_here(gateway):
    """And its successor, at another address under the same name, is known again from its first word."""
    gateway.manage("/api/engines/gpu/restart", method="POST")
    asyncio.run(chat(gateway.base_url, KEY, 10, SEED + 2))
    ready(gateway, "gpu/0", "gpu/1", restarted=True)
    deadline = time.monotonic() + 120
    while known(gateway) != {"gpu/0", "gpu/1"}:
        assert time.monotonic() < deadline, gateway.manage("/api/status")["endpoints"]
        time.sleep(0.1)
    before = len(gateway.rows())
    ids = asyncio.run(chat(gateway.base_url, KEY, 30, SEED + 3))
    rows = {row["request_id"]: row for row in gateway.rows(before + 30, within_s=60)}
    wrong = [rows[i] for i in ids if rows[i]["predicted_cached_tokens"] != rows[i]["cache_read_tokens"]]
    assert len(wrong) <= 1, wrong
