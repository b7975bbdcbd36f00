"""The suites of the queue's stores fail for stores that break a promise."""

import asyncio

import pytest

import gateway.stores.queue_jobs
import gateway.stores.queue_moves
import gateway.stores.queue_turns
from gateway.stores.queue_sqlite import SqliteQueueStore
from gateway.stores.queue_thread import StoreThread
from tests.gateway.stores import test_queue_stores as promises
from tests.gateway.stores.test_queue_machine import InSqlite
from tests.mutants.queue import MUTANTS
from tests.support.queue_clock import QueueClock
from tests.support.queue_jobs import NO_LIMITS, a_job
from tests.support.queue_stores import Queue

BROKEN = (
    (gateway.stores.queue_moves, "is_held"),
    (gateway.stores.queue_jobs, "is_held"),
    (gateway.stores.queue_turns, "pick"),
    (gateway.stores.queue_turns, "has_ready"),
    (StoreThread, "_commit"),
)


@pytest.fixture
def broken(monkeypatch):
    """Makes a mutant of this process; it is whole again after the test."""

    def breaks(mutant: str) -> None:
        for owner, name in BROKEN:
            monkeypatch.setattr(owner, name, getattr(owner, name))
        MUTANTS[mutant]()

    return breaks


@pytest.fixture
async def queue(tmp_path):
    clock = QueueClock()
    pair = Queue(*(SqliteQueueStore(tmp_path, clocks=clock.clocks) for _ in range(2)), clock)
    yield pair
    await pair.close()


async def test_a_store_without_a_fence_is_caught(queue, broken):
    broken("fences_nobody")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        await promises.test_a_lapsed_lease_is_worth_nothing_once_the_job_is_elsewhere(queue)


async def test_a_store_that_hands_out_what_is_leased_is_caught(queue, broken):
    broken("claims_what_is_leased")
    with pytest.raises(AssertionError):
        await promises.test_of_many_that_claim_at_once_each_job_goes_to_one(queue)


@pytest.mark.parametrize("is_broken", [False, True])
async def test_a_store_that_answers_before_the_commit_is_caught(tmp_path, broken, is_broken):
    """Killed at the commit: nobody may have been told that the job is there."""
    if is_broken:
        broken("acknowledges_before_the_commit")
    place = InSqlite(tmp_path)
    store = await place.open()
    await store.submit(a_job("job_a"), NO_LIMITS)
    while await store.get("t1", "job_a") is None:  # a broken build has told us too early
        await asyncio.sleep(0.005)
    died = place.break_next(store, 0, ("COMMIT",))
    was_told = True
    try:
        await store.submit(a_job("job_b"), NO_LIMITS)
    except Exception:
        was_told = False
    await store.close()
    assert died()
    store = await place.open()
    assert await store.get("t1", "job_b") is None
    assert was_told == is_broken
    await store.close()
