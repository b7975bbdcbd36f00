import asyncio
import json
import logging
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from gateway import ledger as ledger_module
from gateway.intents import DIRECTORY_NAME, recover_orphans
from gateway.jsonl import JsonlLog
from gateway.ledger import Ledger
from gateway.stores.sqlite import DATABASE_NAME, StorageError, database, open_database
from tests.support.builders import an_exchange
from tests.support.ledger_rows import a_row, rows_in

LOCK = """
import sys, apsw
connection = apsw.Connection(sys.argv[1])
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
async def ledger(tmp_path):
    ledger = Ledger(tmp_path, "0-1", slots=16)
    yield ledger
    await ledger.stop()


@contextmanager
def locked_by_another_process(path):
    process = subprocess.Popen(
        [sys.executable, "-c", LOCK, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    try:
        yield
    finally:
        process.communicate("")


@contextmanager
def broken(monkeypatch, ledger, pragma: str):
    """The ledger's connections get a real limit of SQLite's; it opens another one after each failure."""

    def opened(path, **options):
        connection = open_database(path, **options)
        connection.execute(f"PRAGMA {pragma}")
        return connection

    with monkeypatch.context() as patched:
        patched.setattr(ledger_module, "open_database", opened)
        ledger._connection.execute(f"PRAGMA {pragma}")
        yield


async def until(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)


async def test_rows_reach_the_database_and_their_slots_come_back(tmp_path, ledger) -> None:
    for n in range(10):
        ledger.open(an_exchange(request_id=f"r{n}"))
    assert ledger.health().slots_in_use == 10
    for n in range(10):
        ledger.close(a_row(f"r{n}", cost_nanousd=n))
    ledger.close(a_row("never opened"))
    assert await ledger.flush()
    health = ledger.health()
    assert (health.rows_written, health.backlog, health.slots_in_use, health.last_error) == (11, 0, 0, "")
    assert sum(row.cost_nanousd for id_, row in rows_in(tmp_path).items() if id_ != "never opened") == 45


async def test_a_row_is_written_without_anybody_asking(tmp_path, ledger) -> None:
    ledger.close(a_row("first"))
    await until(lambda: ledger.health().rows_written == 1)
    # Long enough for the thread to go to sleep: the next row must wake it.
    await until(lambda: ledger._is_asleep)
    ledger.close(a_row("second"))
    await until(lambda: ledger.health().rows_written == 2)
    assert set(rows_in(tmp_path)) == {"first", "second"}


async def test_a_request_sent_to_a_second_candidate_keeps_its_first_intent(tmp_path, ledger) -> None:
    exchange = an_exchange(request_id="a")
    ledger.open(exchange)
    ledger.open(exchange)
    assert ledger.health().slots_in_use == 1
    ledger.close(a_row("a"))
    await ledger.flush()
    assert ledger.health().slots_in_use == 0


async def test_more_rows_than_slots_are_written_all_the_same(tmp_path, ledger) -> None:
    for n in range(2000):
        ledger.open(an_exchange(request_id=f"r{n}"))
    assert ledger.health().slots_missed == 1984
    for n in range(2000):
        ledger.close(a_row(f"r{n}"))
    assert await ledger.flush()
    assert len(rows_in(tmp_path)) == 2000
    assert ledger.health().slots_in_use == 0


async def test_two_workers_write_to_one_database(tmp_path) -> None:
    workers = [Ledger(tmp_path, f"{n}-1") for n in range(2)]
    for n in range(1000):
        workers[n % 2].close(a_row(f"r{n}", worker=f"{n % 2}-1"))
    assert [await worker.stop() for worker in workers] == [0, 0]
    assert len(rows_in(tmp_path)) == 1000
    assert list((tmp_path / DIRECTORY_NAME).iterdir()) == []


async def test_while_another_program_holds_the_lock_requests_go_on(tmp_path, ledger) -> None:
    with locked_by_another_process(tmp_path / DATABASE_NAME):
        started = time.perf_counter()
        for n in range(100):
            ledger.close(a_row(f"r{n}"))
        assert time.perf_counter() - started < 4.0
        assert not await ledger.flush(0.3)
        assert ledger.health().backlog == 100
    assert await ledger.flush()
    assert len(rows_in(tmp_path)) == 100
    assert ledger.health().rows_lost == 0


@pytest.mark.parametrize(
    ("pragma", "sentence"), [("max_page_count = 1", "No space left"), ("query_only = ON", "read-only")]
)
async def test_what_a_broken_disk_holds_up_is_written_once_it_works(
    tmp_path, ledger, monkeypatch, caplog, pragma, sentence
) -> None:
    with database(tmp_path / DATABASE_NAME) as connection:  # no free page left inside
        connection.execute("CREATE TABLE filler (x)")
    with broken(monkeypatch, ledger, pragma):
        for n in range(300):
            ledger.open(an_exchange(request_id=f"r{n}"))
            ledger.close(a_row(f"r{n}", team="t" * 200))
        await until(lambda: ledger.health().flush_failures >= 2)
        health = ledger.health()
        assert (health.rows_written, health.backlog, health.rows_lost) == (0, 300, 0)
        assert sentence in health.last_error
        assert rows_in(tmp_path) == {}
    assert await ledger.flush()
    health = ledger.health()
    assert (health.rows_written, health.backlog, health.rows_lost, health.last_error) == (300, 0, 0, "")
    assert len(rows_in(tmp_path)) == 300
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert sentence in errors[0].getMessage()


async def test_beyond_the_backlog_rows_are_lost_counted_and_shouted(tmp_path, monkeypatch, caplog) -> None:
    ledger = Ledger(tmp_path, "0-1", slots=16, max_backlog=50)
    with broken(monkeypatch, ledger, "query_only = ON"):
        await ledger.flush(0.0)
        for n in range(60):
            ledger.open(an_exchange(request_id=f"r{n}"))
            ledger.close(a_row(f"r{n}"))
        await until(lambda: ledger.health().flush_failures >= 1)
        assert (ledger.health().backlog, ledger.health().rows_lost) == (50, 10)
    assert await ledger.stop() == 0
    assert set(rows_in(tmp_path)) == {f"r{n}" for n in range(50)}
    assert "10 rows lost" in caplog.text


async def test_a_row_the_database_refuses_does_not_hold_up_the_others(tmp_path, ledger, caplog) -> None:
    for n in range(20):
        ledger.close(a_row(f"r{n}", cost_nanousd=2**63 if n == 7 else n))
    assert await ledger.flush()
    assert set(rows_in(tmp_path)) == {f"r{n}" for n in range(20) if n != 7}
    health = ledger.health()
    assert (health.rows_written, health.rows_lost, health.slots_in_use) == (19, 1, 0)
    assert "row of r7" in caplog.text


async def test_stopping_writes_what_waits(tmp_path) -> None:
    ledger = Ledger(tmp_path, "0-1")
    for n in range(1200):
        ledger.close(a_row(f"r{n}"))
    assert await ledger.stop() == 0
    assert len(rows_in(tmp_path)) == 1200


async def test_what_cannot_be_written_at_the_stop_is_recovered_by_the_next_start(
    tmp_path, monkeypatch, caplog
) -> None:
    ledger = Ledger(tmp_path, "0-1", slots=16)
    with broken(monkeypatch, ledger, "query_only = ON"):
        for n in range(20):
            ledger.close(a_row(f"r{n}"))
        assert await ledger.stop() == 20
    assert ledger.health().rows_lost == 4  # those without a slot
    assert "4 rows lost" in caplog.text
    assert recover_orphans(tmp_path) == 16
    assert set(rows_in(tmp_path)) == {f"r{n}" for n in range(16)}


async def test_requests_cut_by_the_stop_are_recovered_as_interrupted(tmp_path) -> None:
    ledger = Ledger(tmp_path, "0-1")
    ledger.open(an_exchange(request_id="a"))
    await ledger.stop()
    assert recover_orphans(tmp_path) == 1
    assert rows_in(tmp_path)["a"].ended == "interrupted"


async def test_the_cost_log_has_the_rows_that_were_committed(tmp_path) -> None:
    path = tmp_path / "costs.jsonl"
    ledger = Ledger(tmp_path, "0-1", jsonl=JsonlLog(path))
    for n in range(30):
        ledger.close(a_row(f"r{n}", cost_nanousd=2**63 if n == 7 else n))
    await ledger.stop()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["request_id"] for line in lines) == sorted(rows_in(tmp_path))


def test_a_storage_that_cannot_be_used_fails_the_start(tmp_path) -> None:
    (tmp_path / DATABASE_NAME).write_bytes(b"no database" * 100)
    with pytest.raises(StorageError):
        Ledger(tmp_path, "0-1")
