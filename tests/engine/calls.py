"""What the engine's tests ask for, and how they wait."""

import time
from collections.abc import Callable
from typing import Any

LONG = "The ledger keeps one row for each request, and the spillway opens when there is too much water. " * 12
# As good as endless: longer than a test takes, on however busy a machine, unless somebody stops it.
ENDLESS_TOKENS = 16_000
ENDLESS = {"max_tokens": ENDLESS_TOKENS, "extra_body": {"ignore_eos": True}}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ask(client: Any, text: str = "Hello", session: str = "", **fields: Any) -> Any:
    """A short greedy chat; of an asynchronous SDK, to be awaited."""
    headers = {"x-session-affinity": session} if session else {}
    given = {"model": "tiny", "max_tokens": 8, "temperature": 0, **fields}
    return client.chat.completions.create(messages=user(text), extra_headers=headers, **given)


async def occupy(client: Any, session: str, count: int) -> list[Any]:
    """That many endless streams, to be closed. One after the other: a burst would overflow the engine's queue."""
    streams = []
    for _ in range(count):
        stream = await ask(client, session=session, stream=True, **ENDLESS)
        await anext(stream)
        streams.append(stream)
    return streams


def until(is_so: Callable[[], bool], within_s: float = 120.0) -> float:
    """Seconds until it was so."""
    began_at = time.perf_counter()
    while not is_so():
        assert time.perf_counter() - began_at < within_s, f"not so within {within_s} s"
        time.sleep(0.005)
    return time.perf_counter() - began_at


def said(events: list[Any]) -> str:
    """The text of a chat's chunks."""
    return "".join(choice.delta.content or "" for event in events for choice in event.choices)
