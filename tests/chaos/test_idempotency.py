"""Many identical requests at once over many workers: each key is carried out once, and a broken build is caught."""

import asyncio
from collections import Counter

import openai
import pytest

from tests.support.gateway_process import KEY, Gateway
from tests.support.upstream_thread import UpstreamThread

pytestmark = pytest.mark.chaos

KEYS, AT_ONCE = 12, 8


async def carried_out(gateway: Gateway) -> None:
    """All keys, each asked for several times at once, until everybody has an answer."""
    clients = [
        openai.AsyncOpenAI(base_url=gateway.base_url, api_key=KEY, max_retries=8, timeout=30)
        for _ in range(AT_ONCE)  # each with connections of its own, so that all workers take part
    ]

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        answer = await client.chat.completions.create(
            model="acme/late-150",
            messages=[{"role": "user", "content": f"number {number}"}],
            extra_headers={"Idempotency-Key": f"key-{number}"},
        )
        return answer.id

    try:
        await asyncio.gather(*(ask(client, number) for number in range(KEYS) for client in clients))
    finally:
        await asyncio.gather(*(client.close() for client in clients))


@pytest.mark.parametrize("mutant", [None, "looks_before_it_claims"])
async def test_each_key_is_carried_out_once_over_all_workers(tmp_path, mutant):
    with UpstreamThread() as thread:
        upstream = thread.start()
        broken = (
            {"module": "tests.mutants.gateway", "environ": {"HEADGATE_TEST_MUTANT": mutant}} if mutant else {}
        )
        provider = {"type": "openai", "api_key": "sk-upstream-0d5b6c1e9f", "base_url": f"{upstream.url}/v1"}
        gateway = Gateway(tmp_path, workers=3, providers={"acme": provider}, **broken)
        await asyncio.to_thread(gateway.start)
        try:
            await carried_out(gateway)
        finally:
            await asyncio.to_thread(gateway.stop)
        times = Counter(record.json["messages"][0]["content"] for record in upstream.journal)
    assert len(times) == KEYS
    twice = {content for content, count in times.items() if count > 1}
    assert bool(twice) == bool(mutant), times
