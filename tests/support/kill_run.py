"""One run of the kill test: a gateway under load whose workers are killed, and what its ledger has otherwise than it
should.

Three witnesses are compared: the clients' memory, the journal of the upstream, and the ledger. Nothing is asked of
the gateway but its rows.
"""

import asyncio
import contextlib
import json
import math
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import apsw

from tests.support.gateway_process import Gateway
from tests.support.journal_upstream import JournalUpstream
from tests.support.load import Call, Load, loaded_gateway

CLIENTS = 50
THINK_S = 0.02
WORKERS = 2
# The parent holds back after five deaths of young workers in thirty seconds; a new parent does not.
KILLS_PER_ROUND = 5
# A request's answer is handed to the kernel a moment before its row is written to the in-flight file: a kill in
# between leaves a whole answer with a row that says `interrupted`. Microseconds, but the client may run first.
BETWEEN_S = 0.03


@dataclass
class Kill:
    worker: str
    before_at: float  # time.perf_counter() around the kill
    after_at: float
    is_of_all: bool = False  # the whole gateway went, parent included
    ready_again_s: float | None = None  # until another worker took requests in its place

    def hit(self, call: Call) -> bool:
        """Whether the request was under way, or its answer so fresh that its row may not have been written."""
        return call.sent_at <= self.after_at and call.ended_at >= self.before_at - BETWEEN_S

    def may_have_broken(self, call: Call) -> bool:
        """The same, or its connection was a kept one that died before it was used again."""
        unused_s = 0.0 if call.is_new_connection else THINK_S + 0.1
        return call.sent_at <= self.after_at + unused_s and call.ended_at >= self.before_at


class Row(NamedTuple):
    """What of the ledger is compared."""

    request_id: str
    worker: str
    tags: str
    status: int
    ended: str
    is_estimated: bool
    input_tokens: int | None
    cache_read_tokens: int | None
    output_tokens: int | None
    cost_nanousd: int | None

    @property
    def serial(self) -> int:
        """Which of the clients' requests it was."""
        return int(json.loads(self.tags)[0])


class KillRun:
    """Kill first, then ask for the faults."""

    def __init__(self, directory: Path, seed: int, *, module: str = "gateway", mutant: str = "") -> None:
        self.calls: list[Call] = []
        self.kills: list[Kill] = []
        self.between = 0  # whole answers whose row says `interrupted`, because the kill came in between
        self._directory = directory
        self._seed = seed
        self._chance = random.Random(seed)
        self._round_kills = (
            0  # from this kill on those of the round: a new parent names workers from the start
        )
        self._module, self._mutant = module, mutant
        self._upstream = JournalUpstream(directory / "upstream.journal")
        self._costs = directory / "costs.jsonl"
        self._problems: list[str] = []  # seen on the way

    async def kill_workers(self, kills: int) -> None:
        """So many, in rounds: each begins with a start on what the last one left, in whatever state."""
        with self._upstream:
            rounds = range(0, kills, KILLS_PER_ROUND)
            for done in rounds:
                gateway = self._gateway()
                await asyncio.to_thread(gateway.start)
                try:
                    await self._round(
                        gateway, done, min(kills - done, KILLS_PER_ROUND), is_last=done == rounds[-1]
                    )
                finally:
                    gateway.kill()

    def _gateway(self) -> Gateway:
        return loaded_gateway(
            self._directory,
            self._upstream.url,
            workers=WORKERS,
            module=self._module,
            environ={"HEADGATE_TEST_MUTANT": self._mutant},
            ledger={"jsonl": {"path": str(self._costs)}},
        )

    async def _round(self, gateway: Gateway, number: int, kills: int, *, is_last: bool) -> None:
        chance = self._chance
        self._round_kills = len(self.kills)
        await self._all_ready(gateway)
        load = Load(gateway.port, CLIENTS, self._seed * 1000 + number, think_s=THINK_S)
        for _ in range(kills):
            # Not a wait for something: the moment of the kill.
            await asyncio.sleep(chance.uniform(0.05, 0.6))
            await self._kill_one(gateway, is_awaited=chance.random() < 0.7)
        if not is_last and chance.random() < 0.4:
            await asyncio.sleep(chance.uniform(0.05, 0.6))
            await self._kill_all(gateway, load)
        await load.stop()
        self.calls += load.calls
        if gateway.process is not None and gateway.process.poll() is None:
            code = await asyncio.to_thread(gateway.stop)
            for sign in ("Traceback", "could not start"):
                if sign in gateway.log():
                    self._problems.append(f"{sign!r} in the log: {gateway.log()[-2000:]}")
            if code:
                self._problems.append(f"round from kill {number}: the gateway ended with code {code}")

    async def _all_ready(self, gateway: Gateway, within_s: float = 45.0) -> None:
        deadline = time.perf_counter() + within_s
        while (
            len([worker for worker in await self._workers(gateway) if worker["state"] == "ready"]) < WORKERS
        ):
            assert time.perf_counter() < deadline, f"not {WORKERS} workers:\n{gateway.log()[-3000:]}"
            await asyncio.sleep(0.02)

    async def _workers(self, gateway: Gateway) -> list[dict[str, Any]]:
        """Those that live, as far as we know."""
        dead = {kill.worker for kill in self.kills[self._round_kills :]}
        workers = (await asyncio.to_thread(gateway.manage, "/api/status"))["workers"]
        return [worker for worker in workers if worker["name"] not in dead]

    async def _kill_one(self, gateway: Gateway, *, is_awaited: bool) -> None:
        ready: list[dict[str, Any]] = []
        while not ready:
            ready = [worker for worker in await self._workers(gateway) if worker["state"] == "ready"]
        kill = _kill(self._chance.choice(ready))
        self.kills.append(kill)
        if is_awaited:
            await self._all_ready(gateway)
            kill.ready_again_s = time.perf_counter() - kill.after_at

    async def _kill_all(self, gateway: Gateway, load: Load) -> None:
        """Parent and workers at once."""
        workers = await self._workers(gateway)
        load.gateway_is_down()
        gateway.kill()
        for worker in workers:
            kill = _kill(worker)
            kill.is_of_all = True
            self.kills.append(kill)

    def faults(self) -> list[str]:
        """What is otherwise than it should be, a sentence each."""
        rows = self._rows()
        finished = self._upstream.finished()
        found = list(self._problems)
        found += self._client_faults(rows)
        found += self._journal_faults(rows, self._upstream.begun())
        calls = {call.plan.serial: call for call in self.calls}
        for row in rows.values():
            found += self._row_faults(row, calls[row.serial], finished)
        logged = Counter(
            json.loads(line)["request_id"]
            for path in self._directory.glob(f"{self._costs.name}*")
            for line in path.read_text().splitlines()
        )
        found += [
            f"{i}: {count} lines in the cost log" for i, count in logged.items() if count > 1 or i not in rows
        ]
        with contextlib.closing(self._database()) as database:
            integrity = database.execute("PRAGMA integrity_check").fetchall()
        if integrity != [("ok",)]:
            found.append(f"the database is damaged: {integrity[:3]}")
        found += [f"left behind: {path.name}" for path in (self._directory / "data/inflight").iterdir()]
        return found

    def _client_faults(self, rows: dict[str, Row]) -> Iterator[str]:
        for call in self.calls:
            who = f"{call.path} {call.plan.serial} ({call.request_id or 'no id'})"
            if call.outcome in ("refused", "hung"):
                yield f"{who}: {call.outcome}, status {call.status}"
            elif call.outcome == "unknown" and not any(kill.may_have_broken(call) for kill in self.kills):
                yield f"{who}: its connection broke, and no worker was killed"
            elif call.outcome == "ok" and not call.looks_complete:
                yield f"{who}: ended well, but not with its last event"
            if call.outcome == "ok" and call.request_id not in rows:
                yield f"{who}: the client has the answer, and there is no row"

    def _journal_faults(self, rows: dict[str, Row], begun: list[tuple[str, int]]) -> Iterator[str]:
        for who, whats in (
            ("the upstream got request id", [request_id for request_id, _ in begun]),
            ("the upstream got request", [serial for _, serial in begun]),
            ("the ledger has request", [row.serial for row in rows.values()]),
        ):
            counts = Counter[Any](whats)
            yield from (f"{who} {what} {count} times" for what, count in counts.items() if count > 1)
        for request_id, serial in begun:
            row = rows.get(request_id)
            if row is None:
                yield f"{request_id}: the upstream got it, and there is no row"
            elif row.serial != serial:
                yield f"{request_id}: the row is of request {row.serial}, the upstream got {serial}"

    def _row_faults(self, row: Row, call: Call, finished: set[str]) -> Iterator[str]:
        who = f"{row.request_id} ({row.ended}, {call.outcome})"
        billed = (row.cost_nanousd, row.input_tokens, row.cache_read_tokens, row.output_tokens)
        if call.request_id not in ("", row.request_id):
            yield f"{who}: the client was told another id, {call.request_id}"
        if row.ended == "completed":
            tokens = call.plan.tokens
            due = (call.cost_nanousd, tokens.prompt - tokens.cached, tokens.cached, tokens.output)
            if billed != due or row.is_estimated or row.status != 200:
                yield f"{who}: billed {billed} instead of {due}"
            if row.request_id not in finished:
                yield f"{who}: completed, but the upstream had not ended its answer"
        elif row.ended == "interrupted":
            if billed != (None, None, None, None):
                yield f"{who}: interrupted, and yet its cost is known"
            kills = [kill for kill in self.kills if kill.worker == row.worker]
            if not any(kill.hit(call) for kill in kills):
                ago_s = min((abs(kill.before_at - call.ended_at) for kill in kills), default=math.inf)
                yield f"{who}: {row.worker} was not killed then, but {ago_s:.3f} s before or after"
            elif call.outcome == "ok":
                self.between += 1
        else:
            yield f"{who}: nothing but a kill happened to it"

    def _rows(self) -> dict[str, Row]:
        with contextlib.closing(self._database()) as database:
            rows = database.execute(f"SELECT {', '.join(Row._fields)} FROM ledger")
            return {row[0]: Row(*row) for row in rows}

    def _database(self) -> apsw.Connection:
        path = str(self._directory / "data/headgate.db")
        return apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)

    def summary(self) -> str:
        outcomes = Counter(call.outcome for call in self.calls)
        again = sorted(kill.ready_again_s for kill in self.kills if kill.ready_again_s is not None)
        with contextlib.closing(self._database()) as database:
            ends = dict(database.execute("SELECT ended, count(*) FROM ledger GROUP BY 1").fetchall())
        alone = sum(not kill.is_of_all for kill in self.kills)
        restart = f"{statistics.median(again):.2f} s, at most {again[-1]:.2f} s" if again else "not measured"
        return (
            f"{alone} workers killed, and {len(self.kills) - alone} together with their gateway; "
            f"{len(self.calls)} requests, {dict(outcomes)}; rows {ends}; "
            f"{self.between} answers whole but interrupted; ready again after {restart}"
        )


def _kill(worker: dict[str, Any]) -> Kill:
    before_at = time.perf_counter()
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker["pid"], signal.SIGKILL)
    return Kill(worker["name"], before_at, time.perf_counter())
