"""Four simulated engines behind a gateway, an open-loop load on it, one engine made ill and well again; what clients saw.

Requests come at a fixed rate whatever becomes of them, half of them streams, most of them of sessions, so that what is
lost, moved or late is counted against what was asked for and not against what was answered.
"""

import asyncio
import contextlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.gateway_process import KEY, Gateway
from tests.support.rawcli import RawClient
from tests.support.simulator_process import SimulatorProcess

ENGINE = {
    "time_scale": 1,
    "prefill_overhead_us": 20_000,
    "prefill_us_per_token": 20,
    "decode_us_per_token": 3_000,
}
TOKENS = 8
MODEL = "m"
REPLICAS = 4
ILL = 1  # which of them


@dataclass(slots=True)
class Call:
    """One request as its client saw it. Times are the run's, in seconds."""

    session: int  # 0: none
    sent_at: float
    ended_at: float = 0.0
    status: int = 0
    target: str = ""
    is_good: bool = False
    request_id: str = ""


@dataclass(slots=True)
class FaultRun:
    """`with` it: everything runs. `fault(...)` says what is wrong with the engine."""

    directory: Path
    seed: int
    rate: float = 40.0
    health: dict[str, Any] = field(default_factory=dict)
    module: str = "gateway"
    mutant: str = ""
    calls: list[Call] = field(default_factory=list)
    late_s: float = (
        0.0  # by so much the latest request was sent after its time: what the machine did, not the gateway
    )
    engines: list[SimulatorProcess] = field(default_factory=list)
    gateway: Gateway = None
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _idle: list[RawClient] = field(default_factory=list)
    _began_at: float = 0.0

    def __enter__(self) -> "FaultRun":
        with contextlib.ExitStack() as opening:
            self.engines = [
                opening.enter_context(SimulatorProcess(allow_faults=True, seed=n, model="demo", **ENGINE))
                for n in range(REPLICAS)
            ]
            pool = {
                "type": "simulator",
                "endpoints": [f"{engine.url}/v1" for engine in self.engines],
                "deadlines": {"connect_s": 1, "first_byte_s": 2, "idle_s": 2},
                "health": self.health,
            }
            self.gateway = Gateway(
                self.directory,
                workers=2,
                module=self.module,
                environ={"HEADGATE_TEST_MUTANT": self.mutant},
                pools={"gpu": pool},
                models={
                    MODEL: {"targets": [{"pool": "gpu", "model": "demo"}], "price": {"input": 1, "output": 2}}
                },
                logging={"access": False},
            )
            opening.enter_context(self.gateway)
            self._open = opening.pop_all()
        self._began_at = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        for client in self._idle:
            client.close()
        self._open.close()

    @property
    def now(self) -> float:
        return time.perf_counter() - self._began_at

    async def load(self, for_s: float) -> None:
        """Requests at the rate; returns when all of them have ended."""
        chance = random.Random(f"{self.seed} {len(self.calls)}")
        until, tasks, due = self.now + for_s, [], self.now
        while due < until:
            await asyncio.sleep(max(0.0, due - self.now))
            self.late_s = max(self.late_s, self.now - due)
            tasks.append(
                asyncio.create_task(self._call(chance.randrange(61), is_stream=chance.random() < 0.5))
            )
            due += 1 / self.rate
        await asyncio.gather(*tasks)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The engine's process does not run: connections are taken by the kernel, and nothing comes back."""
        process = self.engines[ILL].process
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def dead(self) -> Iterator[None]:
        """The engine is killed; another takes its place, with the same address and an empty cache."""
        port = self.engines[ILL].port
        self.engines[ILL].process.kill()
        self.engines[ILL].process.wait()
        try:
            yield
        finally:
            successor = SimulatorProcess(allow_faults=True, seed=ILL, model="demo", port=port, **ENGINE)
            self.engines[ILL] = self._open.enter_context(successor)

    @contextlib.contextmanager
    def faulty(self, fault: str, engines: tuple[int, ...] = (ILL,)) -> Iterator[None]:
        for n in engines:
            self.engines[n].fault(fault)
        try:
            yield
        finally:
            for n in engines:
                self.engines[n].fault(None)

    @contextlib.contextmanager
    def slow(self, factor: float) -> Iterator[None]:
        self.engines[ILL].post("/sim/condition", json.dumps({"slowness": factor}).encode())
        try:
            yield
        finally:
            self.engines[ILL].post("/sim/condition", json.dumps({"slowness": 1.0}).encode())

    def between(self, since: float, until: float) -> list[Call]:
        """The requests sent in this time."""
        return [call for call in self.calls if since <= call.sent_at < until]

    def share(self, calls: list[Call]) -> float:
        """Of the attempts made for these requests, those at the ill engine, which clients do not see."""
        name, at_it, attempts = f"gpu/{ILL}", 0, 0
        for row in self._rows(calls):
            places = [failed[0] for failed in json.loads(row["failed_attempts"])]
            if row["ended"] != "upstream_failed":
                places.append(row["endpoint"])
            at_it += places.count(name)
            attempts += len(places)
        return at_it / max(1, attempts)

    def amplification(self, calls: list[Call]) -> float:
        """Attempts per request."""
        rows = self._rows(calls)
        return sum(row["attempts"] for row in rows) / max(1, len(rows))

    def wasted_nanousd(self) -> tuple[int, int]:
        """What failed attempts may have cost us, and what the callers were billed for requests that had them."""
        rows = [row for row in self._rows(self.calls) if row["failed_attempts"] != "[]"]
        return sum(row["wasted_nanousd"] for row in rows), sum(row["cost_nanousd"] or 0 for row in rows)

    def moved(self, calls: list[Call]) -> tuple[int, int]:
        """Of the sessions whose home is not the ill engine: those that were sent elsewhere for anybody's health; all of them.

        That a home has more than its share moves sessions too, and is not what this counts.
        """
        rows = self._rows(self.calls)
        homes = {row["session_hash"]: row["endpoint"] for row in rows if row["place_reason"] == "home"}
        others = {session for session, home in homes.items() if home != f"gpu/{ILL}"}
        gone = {
            row["session_hash"]
            for row in self._rows(calls)
            if row["session_hash"] in others and row["place_reason"] == "home_out"
        }
        return len(gone), len(others)

    def left_behind(self) -> dict[str, float]:
        """Counters of load that are not zero, though nothing is under way."""
        names = (
            "headgate_requests_in_flight",
            "headgate_uncached_tokens_in_flight",
            "headgate_attempts_unanswered",
        )
        deadline = time.monotonic() + 30
        while True:
            found = {name: v for name, v in self.gateway.metrics().items() if name.startswith(names) and v}
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def summary(self) -> str:
        """For people: what went wrong, and what the gateway said meanwhile."""
        bad = [call for call in self.calls if not call.is_good]
        told = [f"{len(self.calls)} requests, {len(bad)} bad: {dict(Counter(call.status for call in bad))}"]
        told += [
            f"  {row['ended']} after {row['failed_attempts']}, {row['place_reason']}"
            for row in self._rows(bad[:5])
        ]
        for line in self.gateway.log().splitlines():
            if '"message":"an endpoint' in line:
                said = json.loads(line)
                told.append(
                    f"  {said['time'][14:23]} {said['source']}: {said['message']}, {said['endpoint']}, {said['reason']}"
                )
        return "\n".join(told)

    def _rows(self, calls: list[Call]) -> list[dict[str, Any]]:
        rows = {row["request_id"]: row for row in self.gateway.rows(len(self.calls))}
        return [rows[call.request_id] for call in calls if call.request_id in rows]

    async def _call(self, session: int, *, is_stream: bool) -> None:
        call = Call(session, self.now)
        self.calls.append(call)
        content = f"session {session} " * 20
        body = json.dumps(
            {
                "model": MODEL,
                "stream": is_stream,
                "max_tokens": TOKENS,
                "messages": [{"role": "user", "content": content}],
            }
        ).encode()
        named = f"x-session-id: s{session}\r\n" if session else "x-session-affinity: none\r\n"
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {KEY}\r\n"
            f"{named if session else ''}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        client = None
        try:
            client = (
                self._idle.pop() if self._idle else await RawClient.connect(self.gateway.port, timeout_s=20)
            )
            if client.is_stale():
                client.close()
                client = await RawClient.connect(self.gateway.port, timeout_s=20)
            answer = await client.exchange(head.encode(), body)
        except (TimeoutError, EOFError, OSError):
            if client is not None:
                client.close()
        else:
            call.status, call.target = answer.status, answer.headers.get("x-headgate-target", "")
            call.request_id = answer.headers.get("x-request-id", "")
            whole = b"data: [DONE]" in answer.body if is_stream else True
            call.is_good = answer.status == 200 and answer.is_complete and whole
            if answer.is_complete and answer.headers.get("connection") != "close":
                self._idle.append(client)
            else:
                client.close()
        call.ended_at = self.now
