"""Agent conversations over HTTP, in real time: against real engines through the gateway, or beside other routers.

Plays closed loops of streamed chats against any OpenAI-compatible address and notes of each turn the time to its first
piece, the tokens of its prompt and how many were cached, as the engine's own usage says. Knows no router and no engine.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp
import numpy as np

_WORDS = [
    "the",
    "a",
    "gate",
    "water",
    "channel",
    "ledger",
    "row",
    "key",
    "price",
    "model",
    "token",
    "tool",
    "result",
    "file",
    "line",
    "error",
    "test",
    "run",
    "read",
    "write",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTraffic:
    """Sizes in words (of about 1.5 tokens); `nonce` makes the texts of one run unlike those of any other."""

    nonce: str
    conversations: int
    turns: int
    tenants: int = 3
    shared_words: int = 200
    first_words: int = 150  # of the first question, which brings its files
    turn_words: int = 150
    answer_tokens: int = 12
    wait_s: float = 0.5
    seed: int = 1
    has_session: bool = True


@dataclass(slots=True)
class LiveRecord:
    ttft_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        return sum(self.cached_tokens) / max(1, sum(self.prompt_tokens))

    @property
    def ttft_p50_s(self) -> float:
        return float(np.median(self.ttft_s))

    def quantile_s(self, share: float) -> float:
        return float(np.quantile(self.ttft_s, share))


async def play(url: str, model: str, headers: Mapping[str, str], traffic: LiveTraffic) -> LiveRecord:
    """All conversations side by side; `url` is the base with /v1."""
    record = LiveRecord()
    began_at = time.perf_counter()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, headers=dict(headers), timeout=timeout) as client:
        await asyncio.gather(
            *(_converse(client, url, model, traffic, n, record) for n in range(traffic.conversations))
        )
    record.seconds = time.perf_counter() - began_at
    return record


async def _converse(
    client: aiohttp.ClientSession, url: str, model: str, traffic: LiveTraffic, number: int, record: LiveRecord
) -> None:
    rng = random.Random(traffic.seed * 1000 + number)
    tenant = rng.randrange(traffic.tenants)
    messages = [
        {"role": "system", "content": _text(random.Random(tenant), traffic.shared_words, traffic.nonce)}
    ]
    session = f"{traffic.nonce}-{number}"
    headers = {"x-session-id": session} if traffic.has_session else {}
    await asyncio.sleep(rng.random() * traffic.wait_s * 4)
    for turn in range(traffic.turns):
        words = traffic.turn_words if turn else traffic.first_words
        messages.append({"role": "user", "content": _text(rng, words, f"{session} {turn}")})
        body = {
            "model": model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": traffic.answer_tokens,
            "temperature": 0,
        }
        try:
            said = await _ask(client, f"{url}/chat/completions", body, headers, record)
        except (aiohttp.ClientError, TimeoutError, ValueError) as problem:
            record.errors.append(f"{type(problem).__name__}: {problem}"[:200])
            return
        messages.append({"role": "assistant", "content": said})
        await asyncio.sleep(rng.expovariate(1 / traffic.wait_s))


async def _ask(
    client: aiohttp.ClientSession, url: str, body: object, headers: Mapping[str, str], record: LiveRecord
) -> str:
    said: list[str] = []
    asked_at, first_at, usage = time.perf_counter(), 0.0, None
    async with client.post(url, json=body, headers=headers) as answer:
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {(await answer.text())[:150]}")
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                said.append(choice.get("delta", {}).get("content") or "")
                if not first_at and said[-1]:
                    first_at = time.perf_counter()
    if usage is None:
        raise ValueError("an answer without usage")
    record.ttft_s.append((first_at or time.perf_counter()) - asked_at)
    record.prompt_tokens.append(usage["prompt_tokens"])
    record.cached_tokens.append((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    return "".join(said)


def _text(rng: random.Random, words: int, head: str) -> str:
    return f"{head} " + " ".join(f"{rng.choice(_WORDS)}{rng.randrange(100)}" for _ in range(words))


def balance(before: Sequence[float], after: Sequence[float]) -> float:
    """The fullest replica's part of what was done in between, over the mean."""
    done = [end - start for start, end in zip(before, after, strict=True)]
    return max(done) / (sum(done) / len(done)) if sum(done) else 1.0
