"""One run of the queue's kill test: a gateway that takes jobs while its processes are killed, and what its witnesses say.

Four witnesses: what clients were told, the journal of the upstream, the receiver of webhooks, and, once everything has
come to rest, the job table with the ledger. `tests.support.queue_checker` compares them.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from gateway.limits_config import LimitConfig
from gateway.overflow.job import FINAL, JobFilter
from gateway.overflow.store import QueueStore
from gateway.stores.limit_sqlite import SqliteLimitStore
from gateway.stores.queue_sqlite import SqliteQueueStore
from tests.support.gateway_process import KEY, Gateway
from tests.support.journal_upstream import JournalUpstream, Plan
from tests.support.load import MODEL, Call, loaded_gateway
from tests.support.nodes import worker_pids
from tests.support.queue_checker import Billed, Evidence, Read, Submit, Told, amplification, faults
from tests.support.recordings import Tokens

SUBMITTERS = 50
WORKERS = 2
# A parent holds back when young workers keep dying; a new one does not.
KILLS_PER_ROUND = 5
BUDGET = {"scope": "team:tests", "usd": 1_000_000, "per": "ever"}
_PATIENCE_S = 600.0
_START_S = 300.0  # each of many, on a machine that may be busy with anything
_TROUBLE = (aiohttp.ClientError, OSError, TimeoutError, asyncio.IncompleteReadError)


class Receiver:
    """Of webhooks; remembers what it answered well, and now and then answers badly first."""

    def __init__(self, chance: random.Random) -> None:
        self.told: list[Told] = []
        self.url = ""
        self._chance = chance
        self._seen: set[str] = set()

    async def _hook(self, request: web.Request) -> web.Response:
        event = json.loads(await request.read())
        message_id = request.headers["webhook-id"]
        if message_id not in self._seen and self._chance.random() < 0.05:
            self._seen.add(message_id)  # a second time would be minutes until the next
            return web.Response(status=500)
        self.told.append(Told(message_id, event["data"]["id"], event["type"]))
        return web.Response()

    @contextlib.asynccontextmanager
    async def receiving(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_post("/hook", self._hook)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
        try:
            yield
        finally:
            await runner.cleanup()


class QueueRun:
    """`await kill(...)`, then ask for `faults`. Jobs with odd serial numbers have an idempotency key, and are handed in until
    they are acknowledged; the others are tried once."""

    def __init__(
        self,
        directory: Path,
        seed: int,
        jobs: int,
        *,
        module: str = "gateway",
        mutant: str = "",
        **settings: Any,
    ) -> None:
        self.seen = Evidence(is_told=True)
        self.kills = 0
        self._directory, self._seed, self._jobs = directory, seed, jobs
        self._chance = random.Random(seed)
        self._receiver = Receiver(random.Random(f"{seed} receiver"))
        self._upstream = JournalUpstream(directory / "upstream.journal")
        self._module, self._mutant, self._settings = module, mutant, settings
        self._serials = itertools.count()
        self._may_submit = 0  # so many of the jobs, in step with the kills
        self._acked: list[str] = []
        self._problems: list[str] = []
        self._took_s: dict[str, float] = {}
        self._excused: set[int] = set()  # of answers to clients that look or cancel

    async def kill(self, kills: int, *, is_of_all: bool = False) -> None:
        """Hands in all jobs while so many processes are killed, one by one or the whole service; then waits for the rest.

        Everything is stopped when this returns."""
        with self._upstream:
            async with self._receiver.receiving():
                gateway = self._gateway()
                await asyncio.to_thread(gateway.start, _START_S)
                try:
                    began_at = time.perf_counter()
                    clients = [asyncio.create_task(self._client([gateway], n)) for n in range(SUBMITTERS)]
                    await (self._kill_all if is_of_all else self._kill_workers)(gateway, kills)
                    self._may_submit = self._jobs
                    await asyncio.gather(*clients)
                    self._took_s["killing"] = time.perf_counter() - began_at
                    await self._rest(gateway)
                    self._took_s["all"] = time.perf_counter() - began_at
                    await self._read_all(gateway)
                    code = await asyncio.to_thread(gateway.stop)
                    if code:
                        self._problems.append(f"the gateway ended with code {code}")
                finally:
                    gateway.kill()
                if "Traceback" in gateway.log():
                    self._problems.append(f"a traceback in the log: {gateway.log()[-3000:]}")
        await self._take_evidence()

    def _gateway(self) -> Gateway:
        return loaded_gateway(
            self._directory,
            self._upstream.url,
            workers=WORKERS,
            module=self._module,
            environ={"HEADGATE_TEST_MUTANT": self._mutant},
            limits={"rules": [BUDGET]},
            queue={"enabled": True, "webhooks": {"networks": ["127.0.0.0/8"]}},
            **self._settings,
        )

    # -- clients

    async def _client(self, gateways: Sequence[Gateway], number: int) -> None:
        """Asks any of them, each time."""
        chance = random.Random(f"{self._seed} {number}")
        timeout = aiohttp.ClientTimeout(total=30)
        headers = {"authorization": f"Bearer {KEY}"}
        async with contextlib.AsyncExitStack() as ending:
            sessions = [
                await ending.enter_async_context(
                    aiohttp.ClientSession(gateway.url, headers=headers, timeout=timeout)
                )
                for gateway in gateways
            ]
            while (serial := next(self._serials)) < self._jobs:
                while serial >= self._may_submit:
                    await asyncio.sleep(0.01)
                job_id = await self._submit(chance.choice(sessions), serial, chance)
                if job_id and chance.random() < 0.2:
                    await self._cancel(chance.choice(sessions), job_id)
                if job_id and chance.random() < 0.3:
                    await self._read(chance.choice(sessions), job_id)
                self._acked += [job_id] * bool(job_id)
                if self._acked and chance.random() < 0.3:
                    await self._read(chance.choice(sessions), chance.choice(self._acked))

    async def _submit(self, session: aiohttp.ClientSession, serial: int, chance: random.Random) -> str:
        """The id it was acknowledged with; "": it was not."""
        prompt = chance.randrange(20, 5000)
        tokens = Tokens(prompt, chance.randrange(1, 500), chance.randrange(prompt))
        plan = Plan(serial, tokens, chance.choice((0, 0, 20, 150)))
        self.seen.prices[serial] = Call("", False, plan, 0.0).cost_nanousd
        is_stream = serial % 10 == 0
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": plan.text}],
            "max_tokens": 100,
            "stream": is_stream,
        }
        wanted = {"endpoint": "/v1/chat/completions", "body": body, "reference": str(serial)}
        headers = {"idempotency-key": f"key-{serial}"} if serial % 2 else {}
        if serial % 3 == 0:
            headers["x-headgate-webhook"] = self._receiver.url
        while True:
            job_id = ""
            try:
                async with session.post("/v1/jobs", json=wanted, headers=headers) as answer:
                    told = await answer.json()
                    if answer.status == 202:
                        job_id = told["id"]
                    elif answer.status != 503:
                        self._problems.append(f"request {serial} was answered {answer.status}: {told}")
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.02)  # nobody was there: nothing was handed in
                continue
            except _TROUBLE:
                pass
            self.seen.submits.append(Submit(serial, job_id, headers.get("idempotency-key", "")))
            if job_id or not serial % 2:
                return job_id
            await asyncio.sleep(0.02)

    async def _cancel(self, session: aiohttp.ClientSession, job_id: str) -> None:
        with contextlib.suppress(*_TROUBLE):
            async with session.post(f"/v1/jobs/{job_id}/cancel") as answer:
                if answer.status == 200:
                    self._saw(job_id, (await answer.json())["status"])
                elif answer.status not in self._excused:
                    self._problems.append(f"{job_id} could not be cancelled: {answer.status}")

    async def _read(self, session: aiohttp.ClientSession, job_id: str) -> None:
        with contextlib.suppress(*_TROUBLE):
            async with session.get(f"/v1/jobs/{job_id}", params={"wait": "1"}) as answer:
                if answer.status == 200:
                    self._saw(job_id, (await answer.json())["status"])
                elif answer.status not in self._excused:
                    self._problems.append(f"{job_id} was acknowledged, and then not found: {answer.status}")

    def _saw(self, job_id: str, state: str) -> None:
        """An end stays one; what was said before it may be heard after it."""
        if state in FINAL:
            self.seen.reads.append(Read(job_id, state))

    async def _read_all(self, gateway: Gateway) -> None:
        """Every result that was acknowledged, twice, by whichever worker takes the connection."""
        ids = sorted({submit.job_id for submit in self.seen.submits if submit.job_id})
        headers = {"authorization": f"Bearer {KEY}"}
        timeout = aiohttp.ClientTimeout(total=60)
        connector = aiohttp.TCPConnector(limit=20, force_close=True)
        async with aiohttp.ClientSession(
            gateway.url, headers=headers, timeout=timeout, connector=connector
        ) as session:
            await asyncio.gather(*(self._result(session, job_id) for job_id in ids * 2))

    async def _result(self, session: aiohttp.ClientSession, job_id: str) -> None:
        async with session.get(f"/v1/jobs/{job_id}/result") as answer:
            body = await answer.read()
            if answer.status == 200:
                self.seen.reads.append(Read(job_id, "succeeded", body))
            elif answer.status not in {409, 502, 504}:
                self._problems.append(f"{job_id} has no result: {answer.status} {body[:200]!r}")

    # -- killing

    async def _kill_workers(self, gateway: Gateway, kills: int) -> None:
        is_fresh = True  # until all are up for the first time, one that dies ends the start
        for done in range(kills):
            self._may_submit = self._jobs * (done + 1) // kills
            await asyncio.sleep(
                self._chance.uniform(0.05, 0.6)
            )  # not a wait for something: the moment of the kill
            ready = await self._ready(gateway, WORKERS if is_fresh else 1)
            is_fresh = False
            _kill(self._chance.choice(ready))
            self.kills += 1
            if done % KILLS_PER_ROUND == KILLS_PER_ROUND - 1 and done + 1 < kills:
                await self._restart(gateway, is_graceful=self._chance.random() < 0.5)
                is_fresh = True

    async def _kill_all(self, gateway: Gateway, kills: int) -> None:
        for done in range(kills):
            self._may_submit = self._jobs * (done + 1) // kills
            await asyncio.sleep(self._chance.uniform(0.05, 1.5))
            self.kills += 1
            await self._restart(gateway, is_graceful=False)

    async def _restart(self, gateway: Gateway, *, is_graceful: bool) -> None:
        if is_graceful:
            await asyncio.to_thread(gateway.stop)
        else:
            pids = worker_pids(gateway)
            gateway.kill()
            for pid in pids:
                _kill(pid)
        await asyncio.to_thread(gateway.start, _START_S)

    async def _ready(self, gateway: Gateway, least: int) -> list[int]:
        """Their process ids."""
        deadline = time.monotonic() + 90
        while True:
            workers = (await asyncio.to_thread(gateway.manage, "/api/status"))["workers"]
            ready = [worker["pid"] for worker in workers if worker["state"] == "ready"]
            if len(ready) >= least:
                return ready
            assert time.monotonic() < deadline, gateway.log()[-3000:]
            await asyncio.sleep(0.02)

    # -- evidence

    def _store(self) -> QueueStore:
        return SqliteQueueStore(self._directory / "data")

    async def _billed(self) -> list[Billed]:
        rows = Gateway(self._directory).rows()
        return [Billed(row["request_id"], row["cost_nanousd"]) for row in rows]

    async def _rest(self, gateway: Gateway) -> None:
        """Until nothing is to be done any more: no job, no row, no webhook."""
        store = self._store()
        deadline = time.monotonic() + _PATIENCE_S
        try:
            while True:
                stats = await store.stats()
                left = {state: count for state, count in stats.states.items() if state not in FINAL}
                if not (left or stats.unsettled or stats.outbox_due or stats.outbox_waiting):
                    break
                if time.monotonic() > deadline:
                    self._problems.append(
                        f"no rest after {_PATIENCE_S:g} s: {stats}\n{gateway.log()[-2000:]}"
                    )
                    break
                await asyncio.sleep(0.1)
        finally:
            await store.close()

    async def _take_evidence(self) -> None:
        seen = self.seen
        store = self._store()
        cursor: str | None = None
        while True:
            page = await store.list_jobs(JobFilter(), cursor, 500)
            seen.jobs += page.jobs
            cursor = page.cursor
            if cursor is None:
                break
        for job in seen.jobs:
            seen.serials[job.id] = int(job.reference)
            result = await store.result("", job.id) if job.state == "succeeded" else None
            if result is not None:
                seen.results[job.id] = result.body
        seen.outbox = await store.list_outbox(most=10 * self._jobs)
        stats = await store.stats()
        seen.unsettled, seen.now_time = stats.unsettled, stats.now_time
        await store.close()
        seen.told = self._receiver.told
        seen.begun, seen.finished = self._upstream.begun(), self._upstream.finished()
        seen.ledger = await self._billed()
        seen.held = await self._held()

    async def _held(self) -> int:
        """What is still reserved once that of killed workers has had the time to lapse."""
        limit = LimitConfig.model_validate(BUDGET).limit()
        limits = SqliteLimitStore(self._directory / "data")
        deadline = time.monotonic() + 90
        while True:
            _, (reading,) = await limits.read([limit.counter("tests", time.time_ns() // 1000)])
            if not reading.held or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.5)
        await limits.close()
        return reading.held

    def faults(self) -> list[str]:
        """What is otherwise than it should be, a sentence each."""
        return self._problems + faults(self.seen)

    def summary(self) -> str:
        states = Counter(job.state for job in self.seen.jobs)
        acked = {submit.job_id for submit in self.seen.submits if submit.job_id}
        tries = Counter(bool(submit.job_id) for submit in self.seen.submits)
        deaths = sum(job.deaths for job in self.seen.jobs)
        return (
            f"{self.kills} kills; {len(acked)} jobs acknowledged ({tries[False]} tries were not), {dict(states)}; "
            f"{deaths} runs lost, {amplification(self.seen):.3f} requests upstream for each job; "
            f"{len(self.seen.told)} webhooks for {len(self.seen.outbox)} rows; "
            + ", ".join(f"{name} {took_s:.0f} s" for name, took_s in self._took_s.items())
        )


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
