"""Q10: random lives of jobs, with crashes between any two statements, on both stores. `HEADGATE_TEST_QUEUE_RUNS=2000` for the
long form of 50 steps each; `HEADGATE_TEST_SEED` replays one."""

import asyncio
import os
import random
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from gateway.overflow.store import QueueStore
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.queue_sqlite import SqliteQueueStore
from tests.support.queue_clock import QueueClock
from tests.support.queue_machine import Place, machine
from tests.support.queue_stores import redis_queue
from tests.support.redis_server import RedisServer

RUNS = int(os.environ.get("HEADGATE_TEST_QUEUE_RUNS", "0"))
SEED = int(os.environ.get("HEADGATE_TEST_SEED", random.randrange(10_000)))
SETTINGS = settings(
    max_examples=RUNS or 5,
    stateful_step_count=50 if RUNS else 30,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


CHANGING = frozenset({"INSERT", "UPDATE", "DELETE", "COMMIT", "RELEASE"})


class CrashError(Exception):
    """The process dies here."""


class InSqlite:
    """A database of its own; it is what the machine finds again after an accident."""

    def __init__(self, directory: Path) -> None:
        self.clock = QueueClock()
        self.directory = Path(tempfile.mkdtemp(dir=directory))

    async def open(self) -> QueueStore:
        return SqliteQueueStore(self.directory, clocks=self.clock.clocks)

    def break_next(
        self, store: SqliteQueueStore, after: int, words: Iterable[str] = CHANGING
    ) -> Callable[[], bool]:
        left, has_died = after, False
        connection = store._thread._connection

        def trace(cursor, statement, bindings) -> bool:
            nonlocal left, has_died
            if statement.split()[0] not in words or has_died:
                return True
            left -= 1
            if left < 0:
                has_died = True
                raise CrashError
            return True

        def disarmed() -> bool:
            if not has_died:  # else it was closed
                connection.exec_trace = None
            return has_died

        connection.exec_trace = trace
        return disarmed

    def mute(self, store: SqliteQueueStore) -> None:
        """Whoever carries it out hears of it with its caller, or not at all."""

    def check(self, store: SqliteQueueStore) -> None:
        """The counters are what a count would give."""
        connection = store._thread._connection
        if connection is None:
            return
        ready = "state = 'queued' AND not_before_time IS NULL"
        counted = connection.execute(
            f"SELECT line, tenant, sum({ready} AND class = 0), sum({ready} AND class = 1), "
            "sum(lease_until_time IS NOT NULL), sum(not_before_time IS NOT NULL) FROM job GROUP BY line, tenant"
        ).fetchall()
        kept = connection.execute("SELECT line, tenant, flex, batch, running, delayed FROM share").fetchall()
        assert {row for row in counted if any(row[2:])} == {row for row in kept if any(row[2:])}
        counted = connection.execute(
            "SELECT tenant, count(*), sum(body_bytes) FROM job WHERE state IN ('queued', 'staged') GROUP BY tenant"
        ).fetchall()
        kept = connection.execute("SELECT * FROM load WHERE jobs != 0 OR bytes != 0").fetchall()
        assert sorted(counted) == sorted(kept)
        running = connection.execute("SELECT coalesce(sum(running), 0) FROM line").get
        assert (
            running == connection.execute("SELECT count(*) FROM job WHERE lease_until_time IS NOT NULL").get
        )


class InRedis:
    """A Redis that is emptied first, and a node's disk."""

    def __init__(self, client: redis.Redis, url: str, directory: Path) -> None:
        self.client, self.url, self.clock = client, url, QueueClock()
        self.directory = Path(tempfile.mkdtemp(dir=directory))
        client.flushall()

    async def open(self) -> QueueStore:
        return redis_queue(self.url, self.directory, self.clock)

    def break_next(self, store, after: int) -> Callable[[], bool]:
        """Scripts are whole; what dies is a node before its first word to Redis."""
        node, has_died = store._node, False
        call = node._call

        async def dies(*words, **others):
            nonlocal has_died
            has_died = True
            raise StoreAwayError("killed")

        def disarmed() -> bool:
            node._call = call
            return has_died

        node._call = dies
        return disarmed

    def mute(self, store) -> None:
        """Redis has done it, and the node dies before it can write down that it has."""
        node = store._node
        call = node._call

        async def unheard(verb, *words, **others):
            answer = await call(verb, *words, **others)
            if verb != "begin" and answer[0] == b"ok":
                raise StoreAwayError("killed")
            return answer

        node._call = unheard

    def check(self, store) -> None:
        """Nothing is in an index that is not so."""
        with self.client.pipeline() as trip:
            trip.zrange("{t}:queue:leases", 0, -1)
            trip.smembers("{t}:queue:lines")
            leased, lines = trip.execute()
            for job_id in leased:
                trip.hget(b"{t}:queue:job:" + job_id, "state")
            for line in lines:
                trip.hget(b"{t}:queue:line:" + line, "running")
            found = trip.execute()
        assert set(found[: len(leased)]) <= {b"running", b"cancelling"}
        assert all(int(running or 0) >= 0 for running in found[len(leased) :])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """In memory where there is such a place: what is tested is not the disk."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK):
        with tempfile.TemporaryDirectory(dir=memory) as name:
            yield Path(name)
    else:
        yield tmp_path_factory.mktemp("machine")


def live(open_place: Callable[[asyncio.AbstractEventLoop], Place]) -> None:
    print(f"HEADGATE_TEST_SEED={SEED}: {SETTINGS.max_examples} lives")
    run_state_machine_as_test(seed(SEED)(machine(open_place)), settings=SETTINGS)


def test_jobs_in_sqlite_are_what_they_ought_to_be_whatever_happens(directory):
    live(lambda _: InSqlite(directory))


def test_jobs_in_redis_are_what_they_ought_to_be_whatever_happens(directory):
    with RedisServer(directory / "redis") as server, redis.Redis(port=server.port) as client:
        live(lambda _: InRedis(client, server.url, directory))
