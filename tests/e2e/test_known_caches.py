"""Engines that tell of their caches and their load, and a gateway that listens: where prompts go, and what is foretold."""

import asyncio
import time

import pytest

from tests.support.gateway_process import Gateway
from tests.support.publisher import Publisher
from tests.support.telling_engine import TellingEngine

pytestmark = pytest.mark.e2e

SIZE = 4
WORDS = " ".join(f"word{n}" for n in range(60))
MESSAGES = [{"role": "user", "content": WORDS}]


async def until(condition, within_s=60.0):
    deadline = time.monotonic() + within_s
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.05)


def stored(tokens):
    blocks = len(tokens) // SIZE
    return ["BlockStored", list(range(1, blocks + 1)), None, tokens[: blocks * SIZE], SIZE, None]


async def test_prompts_go_where_the_engines_say_they_are_cached(tmp_path):
    """To the same one from every worker, and to nobody's guess when the engine begins anew."""
    async with TellingEngine() as one, TellingEngine() as two:
        publishers = []
        for number, engine in enumerate((one, two)):
            publisher = Publisher(f"ipc://{tmp_path}/kv{number}", f"ipc://{tmp_path}/replay{number}")
            engine.sources = {"0": {"endpoint": publisher.endpoint, "replay_endpoint": publisher.replay}}
            publishers.append(publisher)
        pool = {
            "type": "vllm",
            "endpoints": [one.base_url, two.base_url],
            "health": {"scrape": "none", "probe": "health"},
            "placement": {"policy": "prefix", "kv_events": True, "tokenize_timeout_s": 30},
        }
        models = {"demo": {"targets": [{"pool": "gpu", "model": "demo"}], "price": {"input": 1.0}}}
        gateway = Gateway(tmp_path, workers=2, pools={"gpu": pool}, models=models)
        try:
            await asyncio.to_thread(gateway.start)
            await told(gateway, publishers, two)
        finally:
            await asyncio.to_thread(gateway.stop)
            for publisher in publishers:
                publisher.stop()


async def told(gateway, publishers, warm):
    def known():
        page = gateway.metrics()
        return {name: page.get(f'headgate_known_cache_blocks{{endpoint="gpu/{name}"}}') for name in (0, 1)}

    async def ask():
        status, headers, body = await asyncio.to_thread(
            gateway.post, "/v1/chat/completions", {"model": "demo", "messages": MESSAGES}
        )
        assert status == 200, body
        return await asyncio.to_thread(gateway.row, headers["x-request-id"], 30)

    await until(lambda: known() == {0: 0.0, 1: 0.0})
    tokens = warm.tokens({"messages": MESSAGES})
    blocks = len(tokens) // SIZE
    publishers[1].publish(stored(tokens))
    await until(lambda: known() == {0: 0.0, 1: 2.0 * blocks})  # each of two workers
    warm.cached_tokens = (len(tokens) - 1) // SIZE * SIZE
    rows = [await ask() for _ in range(8)]  # each on a connection of its own
    assert {row["endpoint"] for row in rows} == {"gpu/1"}
    assert {row["predicted_cached_tokens"] for row in rows} == {warm.cached_tokens}
    assert {row["cache_read_tokens"] for row in rows} == {warm.cached_tokens}
    assert {row["place_reason"] for row in rows} == {"warm"}
    publishers[1].publish(["AllBlocksCleared"])
    await until(lambda: known() == {0: 0.0, 1: 0.0})
    assert (await ask())["predicted_cached_tokens"] == 0
    publishers[1].publish(stored(tokens))
    publishers[1].stop()  # and with it what was known
    await until(lambda: known() == {0: 0.0, 1: None})
    page = await asyncio.to_thread(gateway.metrics)
    assert page['headgate_cache_predictions_total{source="exact"}'] == 9


async def test_an_engine_whose_answer_says_that_many_wait_gets_no_more_for_a_while(tmp_path):
    """And what it said, and that it was asked, stays between the two."""
    async with TellingEngine() as busy, TellingEngine() as free:
        busy.waiting = 50
        pool = {
            "type": "vllm",
            "endpoints": [busy.base_url, free.base_url],
            "health": {"scrape": "none", "probe": "none", "load_header": "text", "load_header_every_s": 300},
            "placement": {"policy": "round-robin", "max_waiting": 5},
        }
        models = {"demo": {"targets": [{"pool": "gpu", "model": "demo"}], "price": {"input": 1.0}}}
        gateway = Gateway(tmp_path, pools={"gpu": pool}, models=models)
        try:
            await asyncio.to_thread(gateway.start)
            for _ in range(8):
                status, headers, _ = await asyncio.to_thread(
                    gateway.post, "/v1/chat/completions", {"model": "demo", "messages": MESSAGES}
                )
                assert status == 200
                assert not any("load-metrics" in name.lower() for name in headers)
        finally:
            await asyncio.to_thread(gateway.stop)
        assert (busy.answers, free.answers) == (1, 7)
        assert (busy.asked_for_load, free.asked_for_load) == (1, 1)
