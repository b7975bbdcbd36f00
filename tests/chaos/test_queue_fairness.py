"""Fair turns and ageing in a queue that is longer than anybody can wait, its time driven by the test.

`HEADGATE_TEST_BACKLOG=10000` for the full run.
"""

import heapq
import itertools
import os
from collections import Counter
from collections.abc import Callable

import pytest

from gateway.overflow.job import Claimed, Job
from tests.support.queue_jobs import LANE, NO_LIMITS, a_job, a_parent, an_answer
from tests.support.queue_stores import STORES, Queue, opened

pytestmark = pytest.mark.chaos

BACKLOG = int(os.environ.get("HEADGATE_TEST_BACKLOG", "400"))
SLOTS = 8
SERVICE_S = 1.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("queue")) as servers:
        yield servers


@pytest.fixture(params=STORES)
async def queue(request, tmp_path, servers):
    pair = await servers.queue(request.param, tmp_path)
    yield pair
    await pair.close()


class Machine:
    """An upstream with so many slots, in which a job takes its time and nothing else does."""

    def __init__(self, queue: Queue, slots: int, lasts_s: Callable[[Job], float]) -> None:
        self.done: list[tuple[Job, float]] = []  # in the order of their ends, with the time of each
        self._queue, self._slots, self._lasts_s = queue, slots, lasts_s
        self._running: list[tuple[float, int, Claimed]] = []
        self._numbers = itertools.count()

    async def run(self, until: Callable[[], bool]) -> None:
        """Until then, or until there is nothing to do."""
        store, clock = self._queue.store, self._queue.clock
        while not until():
            while len(self._running) < self._slots:
                claimed = await store.claim(LANE, "o")
                if claimed is None:
                    break
                ends_time = clock.time_s + self._lasts_s(claimed.job)
                heapq.heappush(self._running, (ends_time, next(self._numbers), claimed))
            if not self._running:
                return
            ends_time, _, claimed = heapq.heappop(self._running)
            clock.time_s = ends_time
            await store.renew([each.lease for _, _, each in self._running])
            await store.finish(claimed.lease, an_answer(units=claimed.job.estimate))
            self.done.append((claimed.job, ends_time))


async def backlog(queue: Queue, tenant: str, count: int, **others) -> None:
    """As batches hand it in: many at a time."""
    for first in range(0, count, 1000):
        jobs = [a_job(tenant=tenant, **others) for _ in range(min(1000, count - first))]
        await queue.store.submit_all(a_parent(tenant=tenant, is_finalized=False), jobs, NO_LIMITS)


async def dwell_s(queue: Queue, machine: Machine, tenant: str, count: int) -> float:
    """p95 from now to the end of `count` jobs that the tenant hands in now."""
    begun_time, before = queue.clock.time_s, len(machine.done)
    await backlog(queue, tenant, count)

    def ended() -> list[float]:
        return [at for job, at in machine.done[before:] if job.tenant == tenant]

    await machine.run(lambda: len(ended()) == count)
    return sorted(at - begun_time for at in ended())[int(count * 0.95) - 1 if count >= 20 else count - 1]


async def test_ten_jobs_behind_a_backlog_take_twice_as_long_at_most(queue, capsys):
    machine = Machine(queue, SLOTS, lambda _: SERVICE_S)
    alone_s = await dwell_s(queue, machine, "b", 10)
    await backlog(queue, "a", BACKLOG)
    await machine.run(lambda: len(machine.done) >= 60)
    behind_s = await dwell_s(queue, machine, "b", 10)
    with capsys.disabled():
        print(f"\nbehind {BACKLOG} jobs: p95 {behind_s:.2f} s, alone {alone_s:.2f} s")
    assert behind_s <= 2 * alone_s + SERVICE_S
    assert BACKLOG - sum(job.tenant == "a" for job, _ in machine.done) > BACKLOG / 2, "the backlog was gone"


async def test_equal_tenants_get_equal_parts_of_a_minute(queue, capsys):
    for tenant in "abcd":
        await backlog(queue, tenant, BACKLOG // 2)
    machine = Machine(queue, SLOTS, lambda _: SERVICE_S)
    until_time = queue.clock.time_s + 60.0 * min(1.0, BACKLOG / 1000)
    await machine.run(lambda: queue.clock.time_s >= until_time)
    parts = Counter(job.tenant for job, _ in machine.done)
    jain = sum(parts.values()) ** 2 / (len(parts) * sum(part**2 for part in parts.values()))
    with capsys.disabled():
        print(f"\nparts {dict(parts)}, Jain's index {jain:.4f}")
    assert len(parts) == 4
    assert jain >= 0.95


async def test_the_part_is_of_tokens_however_large_the_jobs_are(queue, capsys):
    """A job of ten times the tokens takes ten times as long, too."""
    sizes = {"small": 100, "large": 1000}
    await backlog(queue, "small", BACKLOG, estimate=sizes["small"])
    await backlog(queue, "large", BACKLOG // 5, estimate=sizes["large"])
    machine = Machine(queue, SLOTS, lambda job: job.estimate / 100)
    # Long enough for many large ones, and not so long that somebody has nothing left.
    await machine.run(lambda: sum(job.tenant == "small" for job, _ in machine.done) >= BACKLOG * 0.8)
    tokens = Counter[str]()
    for job, _ in machine.done:
        tokens[job.tenant] += sizes[job.tenant]
    with capsys.disabled():
        print(f"\ntokens {dict(tokens)}")
    assert tokens["small"] == pytest.approx(tokens["large"], rel=0.1)


async def test_batch_jobs_grow_old_and_get_their_part_while_flex_saturates(queue, capsys):
    """Half an hour in which more flex jobs come than can be done."""
    slots = max(1, BACKLOG // 400)
    lasts_s, half_an_hour_s = 10.0, 1800.0
    await backlog(queue, "a", 12 * slots, job_class="batch")
    machine = Machine(queue, slots, lambda _: lasts_s)
    begun_time = queue.clock.time_s
    while queue.clock.time_s < begun_time + half_an_hour_s:
        await backlog(queue, "a", 3 * slots, job_class="flex")
        await backlog(queue, "b", 3 * slots, job_class="flex")
        until_time = queue.clock.time_s + 4 * lasts_s
        await machine.run(lambda until_time=until_time: queue.clock.time_s >= until_time)
    waits_s = [
        (job.started_time or at) - job.submitted_time for job, at in machine.done if job.job_class == "batch"
    ]
    share = len(waits_s) / sum(at <= begun_time + half_an_hour_s for _, at in machine.done)
    with capsys.disabled():
        print(f"\n{len(waits_s)} batch jobs, {share:.1%} of all; waited {max(waits_s) / 60:.1f} min at most")
    assert max(waits_s) <= 3600
    assert share >= 0.05
