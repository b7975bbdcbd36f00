"""Clients that keep a gateway busy with a mixture of requests, and remember what became of each.

Each request has a serial number, which is its tag in the ledger and in its prompt for the upstream. None is ever
sent twice, so whatever is in the ledger twice was put there by the gateway.
"""

import asyncio
import contextlib
import itertools
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.support.gateway_process import KEY, Gateway
from tests.support.journal_upstream import Plan
from tests.support.rawcli import RawClient
from tests.support.recordings import Tokens

# path, stream, pause before each part (ms), how often out of 100
MIXED = (
    ("/v1/chat/completions", False, 0, 25),
    ("/v1/chat/completions", False, 150, 10),
    ("/v1/chat/completions", True, 0, 20),
    ("/v1/chat/completions", True, 60, 12),  # most of a second
    ("/v1/embeddings", False, 0, 8),
    ("/v1/messages", False, 0, 5),
    ("/v1/messages", True, 30, 7),
    ("/v1/responses", False, 0, 5),
    ("/v1/responses", True, 30, 8),
)
QUICK = (("/v1/chat/completions", False, 0, 1),)
Kinds = tuple[tuple[str, bool, int, int], ...]
ENDS = {
    "/v1/chat/completions": b"data: [DONE]\n\n",
    "/v1/messages": b'{"type":"message_stop"}\n\n',
    "/v1/responses": b'"type":"response.completed"',
}
MODEL = "m"
# USD per million tokens; as whole nano-dollars per token: 1000, 100, 2000.
PRICE = {"input": 1.0, "cached_input": 0.1, "output": 2.0}

# ok: the whole answer came; refused: another status; unknown: the connection broke; hung: nothing for `patience_s`.
Outcome = Literal["ok", "refused", "unknown", "hung"]


@dataclass(slots=True)
class Call:
    """One request as its client saw it. Times are `time.perf_counter()`."""

    path: str
    is_stream: bool
    plan: Plan
    sent_at: float
    ended_at: float = 0.0
    outcome: Outcome = "unknown"
    request_id: str = ""  # once the head of an answer was seen
    status: int = 0
    looks_complete: bool = False  # the dialect's own end was there
    is_new_connection: bool = False
    max_tokens: int = 100

    @property
    def cost_nanousd(self) -> int:
        tokens = self.plan.tokens
        fresh = tokens.prompt - tokens.cached
        return fresh * 1000 + tokens.cached * 100 + tokens.output * 2000

    def head_and_body(self) -> bytes:
        body = {"model": MODEL, "stream": self.is_stream}
        if self.path == "/v1/embeddings":
            body["input"] = self.plan.text
        elif self.path == "/v1/responses":
            body["input"] = [{"role": "user", "content": self.plan.text}]
        else:
            body |= {"messages": [{"role": "user", "content": self.plan.text}], "max_tokens": self.max_tokens}
        content = json.dumps(body).encode()
        return (
            b"POST %b HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer %b\r\n"
            b"x-headgate-tags: %d\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        ) % (self.path.encode(), KEY.encode(), self.plan.serial, len(content), content)


def loaded_gateway(directory: Path, upstream_url: str, **settings: Any) -> Gateway:
    """Two workers before one upstream, serving the model that the clients ask for."""
    pools = {"up": {"type": "vllm", "endpoints": [f"{upstream_url}/v1"]}}
    models = {MODEL: {"targets": [{"pool": "up", "model": "scripted-1"}], "price": PRICE}}
    quiet = {"logging": {"access": False}}
    return Gateway(directory, **{"workers": 2, "pools": pools, "models": models, **quiet, **settings})


class Load:
    """`clients` of them at once, from `start` to `stop`. The same seed gives each client the same requests."""

    def __init__(
        self,
        port: int,
        clients: int,
        seed: int,
        *,
        kinds: Kinds = MIXED,
        think_s: float = 0.02,
        renewal: float = 0.1,
        max_tokens: int = 100,
        patience_s: float = 20.0,
    ) -> None:
        self.calls: list[Call] = []
        self._serials = itertools.count(seed * 1_000_000)
        self._port = port
        self._kinds = kinds
        self._think_s = think_s
        self._renewal = renewal  # how often a connection is given up for a new one
        self._max_tokens = max_tokens
        self._patience_s = patience_s  # for each piece of an answer
        self._is_stopping = False
        self._is_down = False
        self._tasks = [
            asyncio.ensure_future(self._client(random.Random(f"{seed} {number}")))
            for number in range(clients)
        ]

    async def stop(self) -> None:
        """Returns when every request under way has ended."""
        self._is_stopping = True
        await asyncio.gather(*self._tasks)

    def gateway_is_down(self) -> None:
        """A refused connection is nobody's fault from now on."""
        self._is_down = self._is_stopping = True

    async def _client(self, chance: random.Random) -> None:
        connection: RawClient | None = None
        while not self._is_stopping:
            call = self._next_call(chance)
            self.calls.append(call)
            if connection is not None and (connection.is_stale() or chance.random() < self._renewal):
                connection.close()
                connection = None
            call.is_new_connection = connection is None
            try:
                connection = await self._call(call, connection)
            finally:
                call.ended_at = time.perf_counter()
            if not self._is_stopping:
                await asyncio.sleep(chance.uniform(0, self._think_s))
        if connection is not None:
            connection.close()

    async def _call(self, call: Call, connection: RawClient | None) -> RawClient | None:
        """The connection to use next, or None."""
        call.sent_at = time.perf_counter()
        try:
            if connection is None:
                connection = await RawClient.connect(self._port, timeout_s=self._patience_s)
            await connection.send(call.head_and_body())
            answer = await connection.read_answer()
        except TimeoutError:
            call.outcome = "hung"
        except ConnectionRefusedError:
            call.outcome = "unknown" if self._is_down else "refused"
        except (EOFError, OSError):
            call.outcome = "unknown"
        else:
            call.request_id = answer.headers.get("x-request-id", "")
            call.status = answer.status
            end = ENDS.get(call.path, b"") if call.is_stream else b""
            call.looks_complete = end in answer.body
            if answer.is_complete:
                call.outcome = "ok" if answer.status == 200 else "refused"
                if answer.headers.get("connection") != "close":
                    return connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.close()
        return None

    def _next_call(self, chance: random.Random) -> Call:
        path, is_stream, pause_ms, _ = chance.choices(self._kinds, [kind[3] for kind in self._kinds])[0]
        prompt = chance.randrange(20, 5000)
        if path == "/v1/embeddings":
            tokens = Tokens(prompt, 0)
        else:
            tokens = Tokens(prompt, chance.randrange(1, 500), chance.randrange(prompt))
        plan = Plan(next(self._serials), tokens, pause_ms)
        return Call(path, is_stream, plan, 0.0, max_tokens=self._max_tokens)
