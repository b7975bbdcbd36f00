"""Redis is killed again and again, and comes back with nothing (and once it is flushed): what two nodes have accepted ends once all
the same, with one result and one price, because their journals tell it again. Q3.

`HEADGATE_TEST_QUEUE_LOSSES=30` for the full run; `HEADGATE_TEST_SEED` replays one.
"""

import asyncio
import os
import random
import time

import pytest

from gateway.overflow.job import FINAL, Lease
from gateway.overflow.store import LeaseLostError, QueueStore, StoreAwayError
from tests.support.queue_jobs import LANE, NO_LIMITS, a_job, an_answer
from tests.support.queue_stores import redis_queue
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.chaos

LOSSES = int(os.environ.get("HEADGATE_TEST_QUEUE_LOSSES", "3"))
SEED = int(os.environ.get("HEADGATE_TEST_SEED", random.randrange(10_000)))
JOBS_A_LOSS = 12
SUBMITTERS = RUNNERS = 6
DEADLINE_S = 180.0
GRACE_S = 0.3


class Losses:
    """Two nodes that hand in and run jobs, and what they were told."""

    def __init__(self, nodes: list[QueueStore]) -> None:
        self.nodes = nodes
        self.chance = random.Random(SEED)
        self.numbers = iter(range(LOSSES * JOBS_A_LOSS))
        self.accepted: list[str] = []
        self.results: dict[str, set[bytes]] = {}  # every one that was ever read
        self.rows: dict[str, set[bytes]] = {}  # of the ledger, by what would be their primary key
        self.runs = self.refused = 0

    async def submits(self, store: QueueStore) -> None:
        for number in self.numbers:
            job = a_job(f"job_{number}", tenant=f"t{number % 3}", reservation=b"r")
            while True:
                try:
                    await store.submit(job, NO_LIMITS)
                    break
                except StoreAwayError:
                    await asyncio.sleep(0.02)  # as a client does: the same again
            self.accepted.append(job.id)
            await asyncio.sleep(self.chance.random() * 0.01)

    async def runs_jobs(self, store: QueueStore, owner: str) -> None:
        while True:
            try:
                claimed = await store.claim(LANE, owner)
            except StoreAwayError:
                claimed = None
            if claimed is None:
                await asyncio.sleep(0.02)
                continue
            self.runs += 1
            await asyncio.sleep(self.chance.random() * 0.02)
            await self._finish(store, claimed.lease, f"{claimed.job.id} {self.runs}".encode())

    async def _finish(self, store: QueueStore, lease: Lease, body: bytes) -> None:
        while True:
            try:
                await store.finish(lease, an_answer(body, ledger_row=body))
                return
            except LeaseLostError:
                self.refused += 1
                return
            except StoreAwayError:
                await asyncio.sleep(0.02)

    async def tends(self, store: QueueStore) -> None:
        while True:
            try:
                await store.sweep()
                for row in (taken := await store.take_settled("flow")):
                    if row.ledger_row:
                        self.rows.setdefault(row.job_id, set()).add(row.ledger_row)
                await store.ack_settled(taken)
                if self.accepted:
                    await self.reads(store, self.chance.choice(self.accepted))
            except StoreAwayError:
                pass
            await asyncio.sleep(0.05)

    async def reads(self, store: QueueStore, job_id: str) -> bool:
        """Whether the job has ended."""
        job = await store.get("", job_id)
        if job is None or job.state not in FINAL:
            return False
        assert job.state == "succeeded", (job, job.history)
        result = await store.result("", job_id)
        assert result is not None
        self.results.setdefault(job_id, set()).add(result.body)
        return True

    async def all_ended(self, deadline: float, working: list[asyncio.Task[None]]) -> None:
        for job_id in self.accepted:
            while not await self._has_ended(job_id):
                broken = [task.exception() for task in working if task.done()]
                assert not broken, broken
                job = await self.nodes[0].get("", job_id)
                assert time.monotonic() < deadline, f"{job_id} has not ended: {job}"
                await asyncio.sleep(0.1)

    async def _has_ended(self, job_id: str) -> bool:
        try:
            return all([await self.reads(node, job_id) for node in self.nodes])
        except StoreAwayError:
            return False


async def test_what_redis_loses_the_nodes_tell_it_again(tmp_path, capsys):
    deadline = time.monotonic() + DEADLINE_S * max(1, LOSSES / 3)
    with RedisServer(tmp_path / "redis") as server:
        nodes = [redis_queue(server, tmp_path / name, grace_s=GRACE_S) for name in ("one", "two")]
        losses = Losses(nodes)
        working = [
            asyncio.create_task(work)
            for number, node in enumerate(nodes)
            for work in (
                losses.tends(node),
                *(losses.runs_jobs(node, f"n{number}:{runner}") for runner in range(RUNNERS)),
            )
        ]
        submitting = [asyncio.create_task(losses.submits(node)) for node in nodes for _ in range(SUBMITTERS)]
        for loss in range(LOSSES):
            while len(losses.accepted) < (loss + 0.5) * JOBS_A_LOSS:
                assert time.monotonic() < deadline, "nothing is accepted any more"
                await asyncio.sleep(0.01)
            if loss == LOSSES // 2:
                await asyncio.to_thread(server.command, "FLUSHALL")
            else:
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
        await asyncio.gather(*submitting)
        await losses.all_ended(deadline, working)
        while len(losses.rows) < len(losses.accepted):
            assert time.monotonic() < deadline, "rows for the ledger are missing"
            await asyncio.sleep(0.05)
        for task in working:
            task.cancel()
        ended = await asyncio.gather(*working, return_exceptions=True)
        for node in nodes:
            await node.close()
    with capsys.disabled():
        print(
            f"\nHEADGATE_TEST_SEED={SEED}: {LOSSES} losses, {len(losses.accepted)} jobs, {losses.runs} runs, "
            f"{losses.refused} of them refused"
        )
    assert [each for each in ended if not isinstance(each, asyncio.CancelledError)] == []
    assert len(losses.accepted) == LOSSES * JOBS_A_LOSS
    assert [job for job, bodies in losses.results.items() if len(bodies) > 1] == [], "a result changed"
    assert [job for job, rows in losses.rows.items() if len(rows) > 1] == [], "billed twice"
    assert all(losses.rows[job] == losses.results[job] for job in losses.accepted), "billed for another run"
