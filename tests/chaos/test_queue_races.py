"""Its caller cancels a job while its owner claims it, renews its lease or ends it: one of them wins, whole.

`HEADGATE_TEST_RACES=5000` for the full run; `HEADGATE_TEST_SEED` replays one.
"""

import asyncio
import os
import random
from collections import Counter

import pytest

from gateway.overflow.job import FINAL, Job, Outcome
from gateway.overflow.store import QueueStore
from tests.support.queue_checker import Billed, Evidence, Read, Submit, faults
from tests.support.queue_jobs import LANE, NO_LIMITS, a_job, an_answer
from tests.support.queue_stores import STORES, opened

pytestmark = pytest.mark.chaos

RACES = int(os.environ.get("HEADGATE_TEST_RACES", "200"))
SEED = int(os.environ.get("HEADGATE_TEST_SEED", random.randrange(10_000)))
AT_ONCE = 20
COST = 7


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("queue")) as servers:
        yield servers


class Race:
    """Jobs that are cancelled while they are run, and what everybody saw of it."""

    def __init__(self, caller: QueueStore, owner: QueueStore) -> None:
        self._caller, self._owner = caller, owner
        self._chance = random.Random(SEED)
        self.seen = Evidence()

    async def one(self, serial: int) -> None:
        job_id, chance = f"job_{serial}", self._chance
        await self._caller.submit(a_job(job_id, lane=f"{LANE}-{serial}", webhook="we_1"), NO_LIMITS)
        self.seen.submits.append(Submit(serial, job_id))
        self.seen.serials[job_id] = serial
        self.seen.prices[serial] = COST
        turns = [chance.randrange(9), chance.randrange(4), chance.randrange(4)]
        await asyncio.gather(self._cancel(job_id, turns[0]), self._own(serial, turns[1], turns[2]))

    async def _cancel(self, job_id: str, turns: int) -> None:
        await _pass(turns)
        job = await self._caller.cancel("t1", job_id)
        assert job is not None
        self._read(job)

    async def _own(self, serial: int, before: int, between: int) -> None:
        await _pass(before)
        claimed = await self._owner.claim(f"{LANE}-{serial}", "w")
        if claimed is None:
            return  # it was cancelled in time
        run = f"{claimed.job.id}.{claimed.job.runs}"
        self.seen.begun.append((run, serial))
        await _pass(between)
        state = (await self._owner.renew([claimed.lease])).get(claimed.job.id)
        if state == "cancelling" and serial % 2:
            self._read(await self._owner.finish(claimed.lease, Outcome(state="cancelled", ledger_row=b"1")))
            return
        self.seen.finished.add(run)
        self._read(await self._owner.finish(claimed.lease, an_answer(cost_nanousd=COST, ledger_row=b"7")))

    def _read(self, job: Job) -> None:
        """An end stays one; what was said before it may be heard after it."""
        if job.state in FINAL:
            self.seen.reads.append(Read(job.id, job.state))

    async def judged(self) -> list[str]:
        """Once all have run."""
        for serial in range(RACES):
            job = await self._caller.get("t1", f"job_{serial}")
            assert job is not None
            self.seen.jobs.append(job)
            self._read(job)
            for store in (self._caller, self._owner):
                result = await store.result("t1", job.id)
                if result is not None:
                    self.seen.results[job.id] = result.body
                    self.seen.reads.append(Read(job.id, job.state, result.body))
        while taken := await self._owner.take_settled("o"):
            self.seen.ledger += [Billed(row.job_id, int(row.ledger_row)) for row in taken if row.ledger_row]
            await self._owner.ack_settled(taken)
        self.seen.outbox = await self._caller.list_outbox(most=RACES * 2)
        return faults(self.seen)


async def _pass(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0.0005)


@pytest.mark.parametrize("kind", STORES)
async def test_a_job_is_cancelled_or_finished_and_never_both(tmp_path, servers, capsys, kind):
    queue = await servers.queue(kind, tmp_path)
    race = Race(queue.store, queue.other)
    for first in range(0, RACES, AT_ONCE):
        await asyncio.gather(*(race.one(serial) for serial in range(first, min(first + AT_ONCE, RACES))))
    found = await race.judged()
    await queue.close()
    ends = Counter(f"{job.state} after {job.runs} runs" for job in race.seen.jobs)
    with capsys.disabled():
        print(f"\nHEADGATE_TEST_SEED={SEED}, {kind}: {RACES} races, {dict(ends)}")
    assert not found, "\n".join([f"{len(found)} faults with seed {SEED}", *found[:20]])
    assert {job.state for job in race.seen.jobs} == {"cancelled", "succeeded"}
    assert len(ends) == 3, "not every way was tried"
