"""Random conversations for real engines: shared beginnings, tools, turns that come back, memory that is too small.

Seeded: the same seed asks the same, though not the same order where several are asked at once.
"""

import asyncio
import json
import random
from collections.abc import Mapping
from typing import Any

import aiohttp

TEXT = (
    "a headgate lets water into the channel and opens the spillway when there is too much of it every request "
    "has key a model and price the ledger keeps one row for each of them Paris celsius 12 π €7 {}[] \\n tool"
)
WORDS = TEXT.split()


def words(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def a_tool(rng: random.Random) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "description": words(rng, 3, 9)}},
    }
    return {
        "type": "function",
        "function": {"name": f"tool_{rng.randint(0, 99)}", "parameters": parameters},
    }


class Conversation:
    """A client's: it sends all of it with each turn, as agents do."""

    def __init__(self, rng: random.Random, preambles: list[str], tools: list[list[dict[str, Any]]]) -> None:
        self._rng = rng
        self.messages: list[dict[str, Any]] = []
        if rng.random() < 0.7:
            self.messages.append({"role": "system", "content": rng.choice(preambles)})
        self.tools = rng.choice(tools)

    def body(self) -> dict[str, Any]:
        self.messages.append({"role": "user", "content": words(self._rng, 1, 90)})
        body: dict[str, Any] = {
            "model": "tiny",
            "messages": self.messages,
            "max_tokens": self._rng.choice((1, 1, 2, 4, 24)),
            "temperature": 1.0,
        }
        if self.tools:
            body["tools"] = self.tools
        return body

    def hear(self, answer: Mapping[str, Any]) -> None:
        message = answer["choices"][0]["message"]
        self.messages.append({"role": "assistant", "content": message["content"] or ""})
        if self._rng.random() < 0.05:
            self.messages[-1]["content"] = words(self._rng, 1, 20)  # a client that edits what was said


async def chat(base_url: str, key: str, prompts: int, seed: int, at_once: int = 1) -> list[str]:
    """Asks so many prompts; the ids of the requests."""
    rng = random.Random(seed)
    preambles = [words(rng, 20, 400) for _ in range(5)]
    tools = [[], [], [a_tool(rng)], [a_tool(rng) for _ in range(3)]]
    ids: list[str] = []
    headers = {"authorization": f"Bearer {key}"}

    async def talk(session: aiohttp.ClientSession, mine: random.Random) -> None:
        alive: list[Conversation] = []
        while len(ids) < prompts:
            place = len(ids)
            ids.append("")
            if len(alive) < 6 or mine.random() < 0.15:
                alive.append(Conversation(mine, preambles, tools))
            if len(alive) > 12:
                del alive[mine.randrange(len(alive))]
            conversation = mine.choice(alive)
            async with session.post(f"{base_url}/chat/completions", json=conversation.body()) as reply:
                text = await reply.text()
                assert reply.status == 200, text
                ids[place] = reply.headers["x-request-id"]
            conversation.hear(json.loads(text))
            if sum(len(m["content"]) for m in conversation.messages) > 6000:
                alive.remove(conversation)

    async with aiohttp.ClientSession(headers=headers) as session:
        await asyncio.gather(*(talk(session, random.Random(seed + n)) for n in range(at_once)))
    return ids
