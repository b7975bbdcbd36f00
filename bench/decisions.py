"""What placing one request costs, in CPU time of one process: `python -m bench.decisions`.

Two figures for each policy, pool and prompt. The decision: from a request that was read to its candidates in order
(session found in the body or named, prompt hashed, endpoints ranked), which is what the limits are about. The whole:
that, the load taken and given back, and the memories told of dispatch and answer. CPU time of this thread, the least
of several rounds: wall time and noise of other processes are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from backends.dialect import CHAT
from backends.json_object import JsonObject, read_object
from backends.load import EndpointLoad
from backends.placement_config import PlacementConfig
from backends.pool import Endpoint, Pool
from backends.provider import Provider
from backends.transport import ConnectionPool, Deadlines, Origin
from backends.usage import Usage
from policies.exchange import Caller, Exchange
from policies.health.book import HealthBook
from policies.placement.place import finish, place, take
from policies.placement.registry import placer
from policies.prices import FREE
from policies.routing import Model, Target

POLICIES: Final = ("session", "prefix", "least-loaded", "round-robin", "weighted")
POOLS: Final = (1, 2, 4, 100)
PROMPTS: Final = (1_000, 65_536, 1_000_000)
LIMITS_US: Final = {4: 10.0, 100: 60.0}
# A session named by the client, recognised in the body, or seen for the first time (named; nothing is known of it).
SESSIONS: Final = ("named", "found", "new")
_SESSIONS: Final = 64
_IN_FLIGHT: Final = 5  # at each endpoint: enough that shares are looked at


def a_model(policy: str, endpoints: int) -> Model:
    pool = Pool("p", tuple(_endpoint(number) for number in range(endpoints)))
    settings = PlacementConfig.model_validate({"policy": policy})
    chooses = placer(settings) if endpoints > 1 else None
    return Model("m", (Target("p", pool, "m", FREE, chooses),))


def _endpoint(number: int) -> Endpoint:
    url = f"http://10.0.{number // 256}.{number % 256}:8000/v1"
    origin, base_path = Origin.parse(url)
    provider = Provider(name="vllm", base_url=url)
    endpoint = Endpoint(f"p/{number}", provider, ConnectionPool(origin), base_path, None, Deadlines())
    endpoint.in_flight = _IN_FLIGHT
    return endpoint


def bodies(prompt_bytes: int) -> list[JsonObject]:
    """Conversations with one system prompt, each with a first turn of its own and one that follows."""
    system = ("You are a careful agent. " * (prompt_bytes // 25 + 1))[:prompt_bytes]
    return [
        read_object(
            msgspec.json.encode(
                {
                    "model": "m",
                    "messages": [
                        {"role": "system", "content": system},
                        {"role": "user", "content": f"task {number}"},
                        {"role": "assistant", "content": "done"},
                        {"role": "user", "content": "go on"},
                    ],
                }
            )
        )
        for number in range(_SESSIONS)
    ]


def request(model: Model, *, prompt_bytes: int, session: str, is_whole: bool) -> Callable[[int], None]:
    """Places the n-th request; the whole of it, or the decision only."""
    health = HealthBook()
    caller = Caller("k", "k", "team")
    usage = Usage(input_tokens=prompt_bytes // 8, cache_read_tokens=prompt_bytes // 8, output_tokens=100)
    documents = bodies(prompt_bytes)
    prepared = [
        Exchange(
            "r", CHAT, 0.0, 0.0, caller, model=model, body_bytes=len(document.body), document=document,
            session_hash=(number + 1) * 0x9E3779B97F4A7C15 % 2**64 if session != "found" else 0, usage=usage,
        )
        for number, document in enumerate(documents)
    ]  # fmt: skip
    hashes = [exchange.session_hash for exchange in prepared]

    def one(number: int) -> None:
        place_of = number % _SESSIONS
        exchange = prepared[place_of]
        exchange.ask = exchange.ask_target = None
        exchange.session_hash = hashes[place_of]
        now = number * 0.001
        choice = place(exchange, health, now)[0]
        if not is_whole:
            return
        exchange.candidate = candidate = choice.candidates[0]
        hold = take(exchange, candidate, now)
        hold.prefilled()
        hold.release()
        finish(exchange)

    return one


def cost_us(one: Callable[[int], None], requests: int, rounds: int) -> float:
    """The least of several rounds, less what an empty round costs."""
    empty = min(_round(_nothing, requests) for _ in range(rounds))
    return (min(_round(one, requests) for _ in range(rounds)) - empty) / requests * 1e6


def _nothing(_: int) -> None:
    """The loop's own cost."""


def _round(one: Callable[[int], object], requests: int) -> float:
    began_s = time.thread_time()
    for number in range(requests):
        one(number)
    return time.thread_time() - began_s


def measured(requests: int, rounds: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for policy in POLICIES:
        for endpoints in POOLS:
            for prompt_bytes in PROMPTS:
                for session in SESSIONS:
                    model = a_model(policy, endpoints)
                    options: dict[str, Any] = {"prompt_bytes": prompt_bytes, "session": session}
                    whole = request(model, **options, is_whole=True)
                    decision = request(model, **options, is_whole=False)
                    for number in range(0 if session == "new" else 2 * _SESSIONS):
                        whole(number)
                    found.append(
                        {
                            "policy": policy,
                            "endpoints": endpoints,
                            "prompt_bytes": prompt_bytes,
                            "session": session,
                            "us": round(cost_us(decision, requests, rounds), 1),
                            "whole_us": round(cost_us(whole, requests, rounds), 1),
                        }
                    )
                    _check_load(model)
    return found


def _check_load(model: Model) -> None:
    loads: tuple[EndpointLoad, ...] = model.targets[0].pool.endpoints
    assert all(load.in_flight == _IN_FLIGHT and load.uncached_tokens == 0 for load in loads), "load leaked"


def table(found: list[dict[str, object]]) -> str:
    """A row for each policy and pool; columns by prompt, each with a named session, a recognised one and a new one.

    The decision, and in brackets the whole.
    """
    lines = ["| policy | endpoints | " + " | ".join(f"{size:,} B" for size in PROMPTS) + " | limit |"]
    lines.append("|---|---:|" + "---:|" * (len(PROMPTS) + 1))
    for policy in POLICIES:
        for endpoints in POOLS:
            cells = []
            for size in PROMPTS:
                pair = [
                    f"{row['us']} ({row['whole_us']})"
                    for row in found
                    if (row["policy"], row["endpoints"], row["prompt_bytes"]) == (policy, endpoints, size)
                ]
                cells.append(" / ".join(pair))
            limit = LIMITS_US.get(endpoints)
            lines.append(f"| {policy} | {endpoints} | {' | '.join(cells)} | {limit or ''} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.decisions", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measured(options.requests, options.rounds)
    print(json.dumps(found, indent=1) if options.json else table(found))
    over = [row for row in found if float(str(row["us"])) > LIMITS_US.get(int(str(row["endpoints"])), 1e9)]
    for row in over:
        print(f"over the limit: {row}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
