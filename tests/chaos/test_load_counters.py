"""Item 9: whatever happens to requests, the load they took is given back. Every counter is zero after the storm."""

import asyncio
import json
import os
import random
import time

import pytest

from tests.mutants.placement import MUTANTS
from tests.support.catalogue import answer_for
from tests.support.gateway_process import KEY, Gateway
from tests.support.rawcli import RawClient
from tests.support.scripted_answer import Answer
from tests.support.upstream_thread import UpstreamThread

pytestmark = pytest.mark.chaos

SEED = int(os.environ.get("HEADGATE_TEST_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
REQUESTS = int(os.environ.get("HEADGATE_TEST_STORM", "240"))
ZERO = ("headgate_requests_in_flight", "headgate_uncached_tokens_in_flight", "headgate_waiting_requests")


def answers(chance: random.Random, *, is_stream: bool) -> Answer:
    plain = answer_for("chat", {"model": "plain", "stream": is_stream})
    return chance.choice(
        [
            plain,
            plain,
            plain.late(chance.uniform(0, 0.05)),
            plain.reset_before_head(),
            plain.cut_before_head(),
            plain.hang_before_head(),
            plain.reset_after(1) if is_stream else plain.claiming(9000).reset_after(1),
            plain.hang_after(2) if is_stream else plain.claiming(9000).hang_after(1),
            Answer.of_error(500),
            Answer.of_error(429),
            Answer.of_error(503),
            Answer.of_error(400),
        ]
    )


async def one(gateway: Gateway, chance: random.Random) -> None:
    """A client that asks, and leaves when it has its answer or has had enough."""
    body = {
        "model": "m",
        "stream": chance.random() < 0.5,
        "messages": [
            {"role": "user", "content": f"task {chance.randrange(20)} " + "x" * chance.randrange(5000)}
        ],
    }
    data = json.dumps(body).encode()
    wish = chance.choice(["", "", "", "x-headgate-on-full: reject\r\n", "x-headgate-affinity: none\r\n"])
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {KEY}\r\n{wish}"
    client = await RawClient.connect(gateway.port)
    try:
        await client.send(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        async with asyncio.timeout(chance.choice([0.01, 0.05, 0.3, 1.0])):
            await client.read_answer()
    except (TimeoutError, ConnectionError, AssertionError, asyncio.IncompleteReadError):
        pass  # it is not about the answers
    finally:
        client.close()


async def storm(gateway: Gateway, chance: random.Random) -> None:
    at_once = asyncio.Semaphore(24)

    async def limited() -> None:
        async with at_once:
            await one(gateway, chance)

    await asyncio.gather(*(limited() for _ in range(REQUESTS)))


def counters(gateway: Gateway) -> dict[str, float]:
    return {name: value for name, value in gateway.metrics().items() if name.startswith(ZERO) and value}


def left_after_the_storm(tmp_path, module="gateway", mutant="") -> dict[str, float]:
    """The counters that are not zero some time after the last client has left."""
    print(f"HEADGATE_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    with UpstreamThread() as thread:
        upstreams = [thread.start() for _ in range(3)]
        for upstream in upstreams:
            upstream.script(
                "chat", lambda record: answers(chance, is_stream=record.json.get("stream", False))
            )
        pool = {
            "type": "vllm",
            "endpoints": [f"{upstream.url}/v1" for upstream in upstreams],
            "placement": {"policy": "prefix", "max_in_flight": 6},
            "deadlines": {"first_byte_s": 0.5, "idle_s": 0.5},
        }
        config = {
            "pools": {"p": pool},
            "models": {"m": {"targets": [{"pool": "p"}]}},
            "overload": {"default": {"wait_s": 0.2}},
        }
        environ = {"HEADGATE_TEST_MUTANT": mutant} if mutant else None
        with Gateway(tmp_path, workers=1, module=module, environ=environ, **config) as gateway:
            asyncio.run(storm(gateway, chance))
            deadline = time.monotonic() + 30
            while (left := counters(gateway)) and time.monotonic() < deadline:
                time.sleep(0.2)
        if not mutant:
            assert "Traceback" not in gateway.log()
        return left


def test_item_9_after_a_storm_every_load_counter_is_zero(tmp_path):
    assert left_after_the_storm(tmp_path) == {}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_storm_catches_builds_that_leak(tmp_path, mutant):
    assert left_after_the_storm(tmp_path, "tests.mutants.gateway", mutant)
