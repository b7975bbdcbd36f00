"""The database locked, the disk full: requests are served as before, the trouble is shouted, rows arrive afterwards."""

import asyncio
import contextlib
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from tests.support.gateway_process import Gateway
from tests.support.journal_upstream import JournalUpstream
from tests.support.load import Call, Load, loaded_gateway

pytestmark = pytest.mark.chaos


@pytest.fixture
def upstream(tmp_path) -> Iterator[JournalUpstream]:
    with JournalUpstream(tmp_path / "upstream.journal") as running:
        yield running


def assert_told(gateway: Gateway) -> None:
    assert gateway.metrics()["headgate_ledger_flush_failures_total"] >= 1
    assert "ledger: cannot write" in gateway.wait_log("the database can be written again", within_s=60)


def database_of(directory: Path) -> contextlib.closing[apsw.Connection]:
    return contextlib.closing(apsw.Connection(str(directory / "data/headgate.db")))


async def served_during_trouble(
    gateway: Gateway, begin: Callable[[], Any], end: Callable[[], Any], trouble_s: float = 2.0
) -> list[Call]:
    """Trouble for a while under load; all that was asked before, during and after it."""
    load = Load(gateway.port, 10, 1)
    try:
        await asyncio.sleep(0.5)
        begin()
        before = len(load.calls)
        try:
            await asyncio.sleep(trouble_s)
        finally:
            end()
        served = [call for call in load.calls[before:] if call.outcome == "ok"]
        assert len(served) > 30, "nothing was served while the database could not be written"
        await asyncio.sleep(0.5)
    finally:
        await load.stop()
    return load.calls


def assert_nothing_lost(gateway: Gateway, calls: list[Call]) -> None:
    assert {call.outcome for call in calls} == {"ok"}
    rows = {row["request_id"]: row for row in gateway.rows(len(calls), within_s=60)}
    assert {call.request_id: ("completed", call.cost_nanousd) for call in calls} == {
        request_id: (row["ended"], row["cost_nanousd"]) for request_id, row in rows.items()
    }
    assert gateway.metrics()['headgate_ledger_rows_total{outcome="lost"}'] == 0
    assert "Traceback" not in gateway.log()
    assert gateway.stop() == 0
    with database_of(gateway.directory) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_a_locked_database_holds_up_no_request_and_loses_no_row(tmp_path, upstream) -> None:
    with loaded_gateway(tmp_path, upstream.url) as gateway, database_of(tmp_path) as holder:
        calls = await served_during_trouble(
            gateway,
            lambda: holder.execute("BEGIN IMMEDIATE"),
            lambda: holder.execute("ROLLBACK"),
            trouble_s=3.0,
        )
        await asyncio.to_thread(assert_nothing_lost, gateway, calls)


async def test_files_that_may_not_grow_hold_up_no_request_and_lose_no_row(tmp_path, upstream) -> None:
    """As under a quota: the workers' write-ahead log has reached its limit."""
    wal = tmp_path / "data/headgate.db-wal"
    with loaded_gateway(tmp_path, upstream.url) as gateway:
        workers = gateway.manage("/api/status")["workers"]

        def limit(size: int) -> None:
            for worker in workers:
                resource.prlimit(worker["pid"], resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        calls = await served_during_trouble(
            gateway, lambda: limit(wal.stat().st_size), lambda: limit(resource.RLIM_INFINITY)
        )
        await asyncio.to_thread(assert_told, gateway)
        await asyncio.to_thread(assert_nothing_lost, gateway, calls)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, of 12 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "none", path]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system here")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


async def test_a_full_disk_holds_up_no_request_and_loses_no_row(small_disk, upstream) -> None:
    gateway = loaded_gateway(small_disk, upstream.url, ledger={"intents": 64})
    gateway.log_path = small_disk.parent / "gateway.log"
    ballast = small_disk / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    with gateway:
        calls = await served_during_trouble(gateway, fill, ballast.unlink)
        await asyncio.to_thread(assert_told, gateway)
        await asyncio.to_thread(assert_nothing_lost, gateway, calls)


async def test_rows_that_could_not_be_written_before_the_end_are_there_after_the_next_start(
    tmp_path, upstream
) -> None:
    with loaded_gateway(tmp_path, upstream.url) as gateway, database_of(tmp_path) as holder:
        holder.execute("BEGIN IMMEDIATE")
        load = Load(gateway.port, 10, 2)
        await asyncio.sleep(1.0)
        await load.stop()
        code = await asyncio.to_thread(gateway.stop, 60)
        holder.execute("ROLLBACK")
    assert code == 0
    with loaded_gateway(tmp_path, upstream.url) as gateway:
        rows = {
            row["request_id"]: (row["ended"], row["cost_nanousd"]) for row in gateway.rows(len(load.calls))
        }
    assert rows == {call.request_id: ("completed", call.cost_nanousd) for call in load.calls}
