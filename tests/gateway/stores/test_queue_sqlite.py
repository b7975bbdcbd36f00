"""What only the queue in SQLite does: plans by index, groups that are committed together, results in a folder, its clock."""

import asyncio
import os
import re

import pytest

from gateway.overflow.job import LEASE_S, JobFilter, ParentLease
from gateway.overflow.store import LARGEST_BYTES, StoreAwayError
from gateway.stores import queue_schema
from gateway.stores.limit_sqlite import Clocks
from gateway.stores.queue_list import list_rows
from gateway.stores.queue_sqlite import DATABASE_NAME, SqliteQueueStore
from gateway.stores.sqlite import StorageError, open_database
from tests.support.queue_clock import QueueClock
from tests.support.queue_jobs import LANE, NO_LIMITS, a_job, an_answer


@pytest.fixture
async def store(tmp_path):
    store = SqliteQueueStore(tmp_path)
    yield store
    await store.close()


def statements_of(store, operation):
    """Every statement of an operation, as it went to SQLite."""
    connection, found = store._thread._connection, []

    def trace(cursor, statement, bindings):
        found.append(statement)
        return True

    async def run():
        connection.exec_trace = trace
        await operation
        connection.exec_trace = None
        return found

    return run()


async def test_no_statement_of_a_jobs_life_looks_through_a_table(store, tmp_path):
    for number in range(50):
        await store.submit(a_job(tenant=f"t{number % 3}"), NO_LIMITS)
    statements = await statements_of(store, store.submit(a_job(), NO_LIMITS))
    statements += await statements_of(store, store.claim(LANE, "o"))
    claimed = await store.claim(LANE, "o")
    statements += await statements_of(store, store.renew([claimed.lease]))
    statements += await statements_of(store, store.finish(claimed.lease, an_answer()))
    statements += await statements_of(store, store.owner_died("o"))
    statements += await statements_of(store, store.sweep())
    statements.append("SELECT count(*) FROM outbox WHERE next_time IS NULL AND delivered_time IS NULL")
    connection = open_database(tmp_path / DATABASE_NAME, steps=queue_schema.STEPS)
    scans = [
        (statement, line)
        for statement in statements
        if statement.split()[0] in {"SELECT", "UPDATE", "DELETE"}
        for line in plan_of(connection, statement)
        if re.match(r"SCAN (?!clock|CONSTANT)", line) and "INDEX" not in line
    ]
    connection.close()
    assert scans == []


def plan_of(connection, statement):
    values = (None,) * len(set(re.findall(r"\?\d*", statement))) if "?1" in statement else ()
    values = values or (None,) * statement.count("?")
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)]


@pytest.mark.parametrize("states", [("cancelling",), ("running", "cancelling")])
async def test_what_workers_ask_every_second_is_found_among_what_runs(store, states):
    where = JobFilter(states=states)
    asked = store._thread.write(lambda connection, _: list_rows(connection, where, None, 100))
    (statement,) = [each for each in await statements_of(store, asked) if " FROM job " in each]
    (plan, _) = plan_of(store._thread._connection, statement)
    assert "job_leased" in plan


async def test_the_claim_of_a_long_queue_reads_as_much_as_that_of_a_short_one(store):
    async def steps_of_a_claim():
        connection, count = store._thread._connection, 0

        def tick():
            nonlocal count
            count += 1
            return False

        connection.set_progress_handler(tick, 1)
        await store.claim(LANE, "o")
        connection.set_progress_handler(None)
        return count

    for number in range(40):
        await store.submit(a_job(tenant=f"t{number % 4}"), NO_LIMITS)
    short = await steps_of_a_claim()
    for first in range(0, 3000, 500):
        jobs = [a_job(tenant=f"t{n % 4}") for n in range(first, first + 500)]
        await asyncio.gather(*(store.submit(job, NO_LIMITS) for job in jobs))
    assert await steps_of_a_claim() < 1.5 * short


async def test_what_waits_is_committed_together_and_a_refusal_is_its_own(store):
    commits = []
    connection = store._thread._connection

    def trace(cursor, statement, bindings):
        commits.extend([statement] * (statement == "COMMIT"))
        return True

    connection.exec_trace = trace
    made = await asyncio.gather(
        *(store.submit(a_job(f"job_{number}"), NO_LIMITS) for number in range(100)),
        store.release_parent(ParentLease("batch_x", 1, "o")),
        return_exceptions=True,
    )
    connection.exec_trace = None
    assert sum(not isinstance(each, Exception) for each in made) == 100
    assert len(commits) < 20
    assert (await store.stats()).states == {"queued": 100}


async def test_an_idle_claim_or_sweep_takes_no_lock(store):
    assert "BEGIN IMMEDIATE" not in await statements_of(store, store.claim(LANE, "o"))
    assert "BEGIN IMMEDIATE" not in await statements_of(store, store.sweep())
    assert "BEGIN IMMEDIATE" not in await statements_of(store, store.take_settled("o"))


async def test_a_large_result_is_a_file_that_goes_with_its_job(tmp_path):
    folder, clock = tmp_path / "results", QueueClock()
    store = SqliteQueueStore(tmp_path, result_folder=folder, clocks=clock.clocks)
    await store.submit(a_job("job_a", keep_s=60), NO_LIMITS)
    claimed = await store.claim(LANE, "o")
    body = os.urandom(LARGEST_BYTES + 1)
    await store.finish(claimed.lease, an_answer(body))
    assert (await store.result("t1", "job_a")).body == body
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]
    clock.forward(61)
    await store.sweep()
    assert list(folder.iterdir()) == []
    await store.close()


async def test_a_result_whose_finish_lost_leaves_no_file(tmp_path):
    folder, clock = tmp_path / "results", QueueClock()
    store = SqliteQueueStore(tmp_path, result_folder=folder, clocks=clock.clocks)
    await store.submit(a_job("job_a"), NO_LIMITS)
    claimed = await store.claim(LANE, "o")
    await store.owner_died("o")
    with pytest.raises(Exception, match="job_a"):
        await store.finish(claimed.lease, an_answer(os.urandom(5_000_000)))
    assert list(folder.iterdir()) == []
    await store.close()


async def test_a_wall_clock_that_is_put_forward_ends_no_lease(tmp_path):
    steady, wall = QueueClock(), QueueClock()
    store = SqliteQueueStore(tmp_path, clocks=Clocks(wall.now_us, steady.now_us, "boot"))
    await store.submit(a_job("job_a"), NO_LIMITS)
    claimed = await store.claim(LANE, "o")
    wall.forward(3600)
    assert (await store.sweep()).requeued == 0
    steady.forward(LEASE_S + 1)
    assert (await store.sweep()).requeued == 1
    assert await store.renew([claimed.lease]) == {}
    await store.close()


async def test_a_database_that_cannot_be_written_accepts_nothing_and_is_used_again_when_it_can(tmp_path):
    store = SqliteQueueStore(tmp_path)
    store._thread._connection.set_busy_handler(lambda _: False)
    other = open_database(tmp_path / DATABASE_NAME, steps=queue_schema.STEPS)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreAwayError, match="locked"):
        await store.submit(a_job("job_a"), NO_LIMITS)
    other.execute("ROLLBACK")
    other.close()
    assert (await store.submit(a_job("job_a"), NO_LIMITS)).is_new
    await store.close()
    with pytest.raises(StoreAwayError, match="closed"):
        await store.submit(a_job("job_b"), NO_LIMITS)


def test_a_folder_that_cannot_be_used_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        SqliteQueueStore(tmp_path / "file")


async def test_tenants_that_have_nothing_left_are_forgotten(tmp_path):
    clock = QueueClock()
    store = SqliteQueueStore(tmp_path, clocks=clock.clocks)
    for number in range(5):
        await store.submit(a_job(tenant=f"t{number}", keep_s=60), NO_LIMITS)
        claimed = await store.claim(LANE, "o")
        await store.finish(claimed.lease, an_answer(units=0))
    clock.forward(61)
    await store.sweep()
    assert store._thread._connection.execute("SELECT count(*) FROM share").get == 0
    await store.close()
