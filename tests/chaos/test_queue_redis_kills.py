"""Two nodes whose Redis is killed again and again, and flushed once: every job that either accepted ends, once, and has one
row for the ledger.

`HEADGATE_TEST_REDIS_KILLS=30` for the full run; `HEADGATE_TEST_SEED` replays one.
"""

import asyncio
import contextlib
import os
import random
import time
from collections import Counter, defaultdict

import pytest

from gateway.overflow.job import FINAL, Job, new_id
from gateway.overflow.store import LeaseLostError, QueueStore, StoreAwayError
from tests.support.queue_jobs import LANE, NO_LIMITS, a_job, an_answer
from tests.support.queue_stores import redis_queue
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.chaos

KILLS = int(os.environ.get("HEADGATE_TEST_REDIS_KILLS", "2"))
SEED = int(os.environ.get("HEADGATE_TEST_SEED", random.randrange(10_000)))
AT_ONCE = 4  # submitters and owners, each, of a node
_AGAIN_S = 0.05


class Nodes:
    """Two nodes' stores, those who use them, and what they were told."""

    def __init__(self, stores: list[QueueStore]) -> None:
        self.acked: set[str] = set()
        self.rows: dict[str, set[bytes]] = defaultdict(set)  # by job: what went to the ledger
        self.refused = 0
        self._stores = stores
        self._chance = random.Random(SEED)
        self._may_submit = True
        self._tasks: list[asyncio.Task[None]] = []
        self._submitters: list[asyncio.Task[None]] = []

    def start(self) -> None:
        works = []
        self._submitters = [
            asyncio.create_task(self._submit(store)) for store in self._stores for _ in range(AT_ONCE)
        ]
        for number, store in enumerate(self._stores):
            works += [self._own(store, f"{number}:w{n}@1") for n in range(AT_ONCE)]
            works += [self._sweep(store), self._settle(store, f"{number}:settle")]
        self._tasks = [asyncio.create_task(work) for work in works]

    async def end_submitting(self) -> None:
        self._may_submit = False
        await asyncio.gather(*self._submitters)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        bugs = [error for error in ended if isinstance(error, Exception)]
        assert not bugs, bugs[0]

    async def _submit(self, store: QueueStore) -> None:
        while self._may_submit:
            job = a_job(new_id("job"))
            while True:  # until it is acknowledged, as a client with an idempotency key does
                try:
                    await store.submit(job, NO_LIMITS)
                    break
                except StoreAwayError:
                    await asyncio.sleep(_AGAIN_S)
            self.acked.add(job.id)
            await asyncio.sleep(self._chance.uniform(0, 0.05))

    async def _own(self, store: QueueStore, owner: str) -> None:
        while True:
            claimed = None
            with contextlib.suppress(StoreAwayError):
                claimed = await store.claim(LANE, owner)
            if claimed is None:
                await asyncio.sleep(_AGAIN_S)
                continue
            await asyncio.sleep(self._chance.uniform(0, 0.05))
            row = f"{claimed.job.id} {claimed.lease.fence} {owner}".encode()
            while True:
                try:
                    await store.finish(claimed.lease, an_answer(row, ledger_row=row))
                    break
                except StoreAwayError:
                    await asyncio.sleep(_AGAIN_S)
                except LeaseLostError:
                    self.refused += 1
                    break

    async def _sweep(self, store: QueueStore) -> None:
        while True:
            with contextlib.suppress(StoreAwayError):
                await store.sweep()
            await asyncio.sleep(0.5)

    async def _settle(self, store: QueueStore, owner: str) -> None:
        while True:
            with contextlib.suppress(StoreAwayError):
                taken = await store.take_settled(owner)
                for settled in taken:
                    self.rows[settled.job_id].add(settled.ledger_row)
                await store.ack_settled(taken)
            await asyncio.sleep(0.1)

    async def jobs(self) -> dict[str, Job | None]:
        """Of all that were accepted."""
        found = {}
        for job_id in sorted(self.acked):
            while job_id not in found:
                try:
                    found[job_id] = await self._stores[0].get("t1", job_id)
                except StoreAwayError:
                    await asyncio.sleep(_AGAIN_S)
        return found

    async def ended(self, within_s: float) -> dict[str, Job | None]:
        """Once all have ended, and are settled."""
        deadline = time.monotonic() + within_s
        while True:
            jobs = await self.jobs()
            is_over = all(job is not None and job.state in FINAL for job in jobs.values())
            if (is_over and self.acked <= self.rows.keys()) or time.monotonic() > deadline:
                return jobs
            await asyncio.sleep(0.2)


async def test_what_was_accepted_ends_once_however_often_redis_is_killed(tmp_path, capsys):
    chance = random.Random(SEED)
    with RedisServer(tmp_path / "redis", appendonly="yes", appendfsync="everysec") as server:
        stores = [redis_queue(server, tmp_path / name, timeout_s=2.0, grace_s=1.0) for name in ("a", "b")]
        nodes = Nodes(stores)
        nodes.start()
        troubles = ["kill"] * KILLS + ["flush"]
        chance.shuffle(troubles)
        for trouble in troubles:
            await asyncio.sleep(chance.uniform(0.3, 1.5))
            if trouble == "flush":
                await asyncio.to_thread(server.command, "FLUSHALL")
            else:
                await asyncio.to_thread(server.kill)
                await asyncio.sleep(chance.uniform(0, 0.5))
                await asyncio.to_thread(server.start)
        await nodes.end_submitting()
        jobs = await nodes.ended(within_s=180)
        results = {}
        for job_id in jobs:
            results[job_id] = [await store.result("t1", job_id) for store in stores]
        await nodes.stop()
        for store in stores:
            await store.close()
    states = Counter("lost" if job is None else job.state for job in jobs.values())
    with capsys.disabled():
        print(
            f"\nHEADGATE_TEST_SEED={SEED}: {KILLS} kills and a flush, {len(jobs)} jobs accepted, {dict(states)}; "
            f"{nodes.refused} late ends refused"
        )
    assert states == {"succeeded": len(jobs)}
    double = {job_id: rows for job_id, rows in nodes.rows.items() if len(rows) != 1}
    assert not double, f"{len(double)} were billed for two runs, as {next(iter(double.items()))}"
    for job_id, (first, second) in results.items():
        assert first is not None
        assert first == second
        assert nodes.rows[job_id] == {first.body}, f"{job_id}: another run was billed than answered"
