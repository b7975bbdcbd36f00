"""Many clients at once against one budget, and what became of it."""

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backends.dialect import CHAT
from backends.usage import Usage
from gateway.limits_config import LimitConfig
from gateway.stores.limit_sqlite import SqliteLimitStore
from policies.limits.limit import Limit
from policies.limits.messages import Reading
from tests.support import answers
from tests.support.gateway_process import KEY
from tests.support.rawcli import RawClient
from tests.support.scripted_answer import Answer, Pause
from tests.support.scripted_upstream import Record

DOLLAR = 1_000_000_000
# A tenth of a cent for each token of output, nothing for input.
PRICE = {"input": 0, "output": 1000}
OUTPUT_TOKENS = 50
PROMPT_TOKENS = 2
BUDGET: dict[str, Any] = {"scope": "team:tests", "name": "budget", "usd": 1, "per": "ever"}


def limit_of(rule: dict[str, Any]) -> Limit:
    """A rule of the configuration as a Limit."""
    return LimitConfig.model_validate(rule).limit()


def budget_config(upstream_url: str, **limits: Any) -> dict[str, Any]:
    """A gateway with the model `m` at PRICE, and these limits."""
    return {
        "pools": {"up": {"type": "vllm", "endpoints": [f"{upstream_url}/v1"]}},
        "models": {"m": {"targets": [{"pool": "up", "model": "m-1"}], "price": PRICE}},
        "limits": limits,
        "logging": {"access": False},
    }


def costly(seed: int) -> Any:
    """An upstream that takes a moment, and uses three to five cents."""
    chance = random.Random(seed)

    def script(record: Record) -> Answer:
        del record
        usage = Usage(input_tokens=PROMPT_TOKENS, output_tokens=chance.randint(30, OUTPUT_TOKENS))
        return Answer((Pause(chance.uniform(0.05, 0.3)), answers.whole(CHAT, usage)), framing="chunked")

    return script


def request(*, key: str = KEY, model: str = "m", **fields: Any) -> bytes:
    body = {"model": model, "messages": [], "max_tokens": OUTPUT_TOKENS, **fields}
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


async def burst(ports: Sequence[int], count: int, **fields: Any) -> list[int]:
    """So many clients at the same moment, in turn over the ports. The statuses of the answers."""
    clients = [await RawClient.connect(ports[number % len(ports)]) for number in range(count)]

    async def ask(client: RawClient) -> int:
        try:
            return (await client.exchange(request(**fields))).status
        finally:
            client.close()

    return list(await asyncio.gather(*map(ask, clients)))


async def one_by_one(port: int, **fields: Any) -> int:
    """One after the other until one is refused; how many were not."""
    for number in range(1000):
        if await burst([port], 1, **fields) != [200]:
            return number
    raise AssertionError("nothing was refused")


def readings(directory: Path, *limits: tuple[Limit, str]) -> list[Reading]:
    """Where limits and their members stand in the embedded store."""
    store = SqliteLimitStore(directory)
    try:
        now_us, _ = store.look([])
        return store.look([limit.counter(member, now_us) for limit, member in limits])[1]
    finally:
        store.shut()


async def settled(directory: Path, *limits: tuple[Limit, str], within_s: float = 30.0) -> list[Reading]:
    """The same, once nothing is reserved any more, or the time is over."""
    deadline = asyncio.get_running_loop().time() + within_s
    while True:
        stands = await asyncio.to_thread(readings, directory, *limits)
        if not any(reading.held for reading in stands):
            return stands
        if asyncio.get_running_loop().time() > deadline:
            return stands
        await asyncio.sleep(0.05)
